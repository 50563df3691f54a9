"""Documents from what people have: every kind of file, table, data set, chat and token ids; the rest is refused."""

import codecs
import gzip
import itertools
import json

import datasets
import pandas as pd
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import prunekit as pk
from prunekit.documents import documents_of, read_documents
from prunekit.errors import PrunekitError
from prunekit.recovery.data import training_windows

TEXTS = ["one, text", 'another "text"']
RECORDS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
CHAT = [{"role": "user", "content": "how?"}, {"role": "assistant", "content": "so"}]
SHAREGPT = [{"from": "human", "value": "how?"}, {"from": "gpt", "value": "so"}]
WRITTEN = "<user>how?<assistant>so"
FILES = {
    "a.jsonl": LINES,
    "a.JSONL": LINES,
    "a.ndjson": LINES,
    "a.json": json.dumps(RECORDS),
    "lines.json": LINES,
    "a.csv": 'id,text\n0,"one, text"\n1,"another ""text"""\n',
    "semicolons.CSV": 'id;text\n0;one, text\n1;"another ""text"""\n',
    "a.tsv": 'id\ttext\n0\tone, text\n1\t"another ""text"""\n',
}


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"<s>": 0, **{f"w{i}": i for i in range(1, 64)}}, "w1"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", chat_template=template)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8, codecs.BOM_UTF16_LE], ids=["no mark", "utf-8", "utf-16"])
@pytest.mark.parametrize("name", FILES)
def test_each_format_gives_the_same_documents(tmp_path, name, mark, packed):
    written = FILES[name].encode("utf-16-le" if mark == codecs.BOM_UTF16_LE else "utf-8")
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(mark + written) if packed else mark + written)
    assert read_documents(path) == TEXTS
    assert read_documents(str(path)) == TEXTS


def test_a_column_alone_keeps_its_tabs_and_commas(tmp_path):
    texts = ["left\tright", "x\ty", "a, b; c"]
    pd.DataFrame({"text": texts}).to_csv(tmp_path / "one.csv", index=False)
    assert read_documents(tmp_path / "one.csv") == texts
    (tmp_path / "tab.tsv").write_text("text,more\tid\nhello\t1\n")
    with pytest.raises(PrunekitError, match="no text in a record with text,more, id"):
        read_documents(tmp_path / "tab.tsv")


@pytest.mark.parametrize("row", ["Hello, world,1", "Hello,1,", "a,b,c,d"])
def test_a_row_longer_than_the_header_is_refused(tmp_path, row):
    (tmp_path / "a.csv").write_text(f"text,label\n{row}\nBye, moon,0\n")
    with pytest.raises(PrunekitError, match="cannot read .*a.csv.* as a table"):
        read_documents(tmp_path / "a.csv")


def test_line_ends_of_windows_are_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo")
    (tmp_path / "a.jsonl").write_bytes(LINES.replace("\n", "\r\n").encode())
    assert read_documents(tmp_path / "a.txt") == ["one\ntwo"] and read_documents(tmp_path / "a.jsonl") == TEXTS


def test_parquet_tables_and_data_sets_give_their_text_column(tmp_path):
    frame = pd.DataFrame(RECORDS)
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_parquet(tmp_path / "no_suffix")
    data = datasets.Dataset.from_list(RECORDS)
    streamed = data.to_iterable_dataset()
    for source in (tmp_path / "a.parquet", tmp_path / "no_suffix", frame, data, streamed, iter(RECORDS)):
        assert read_documents(source) == TEXTS


def test_a_file_that_is_no_text_is_refused_by_format(tmp_path):
    (tmp_path / "a.xlsx").write_bytes(b"PK\x03\x04\0\0\0\0")
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(LINES.encode())[:-9])
    damaged = bytearray(gzip.compress(LINES.encode() * 99))
    damaged[30:60] = bytes(30)
    (tmp_path / "damaged.txt.gz").write_bytes(damaged)
    (tmp_path / "long.json").write_text("1" * 5000)
    (tmp_path / "line.jsonl").write_text('{"text": "x"}\n{"text": \n')
    (tmp_path / "empty.csv").write_text("")
    for name, said in {
        "a.xlsx": "a.xlsx.*no text; give .*parquet",
        "a.parquet": "cannot read .*a.parquet.* as Parquet",
        "cut.jsonl.gz": "cannot read .*cut.jsonl.gz",
        "line.jsonl": "line.jsonl, line 2: this is no JSON",
        "damaged.txt.gz": "cannot read .*damaged.txt.gz",
        "long.json": "cannot read .*long.json.* as JSON",
        "empty.csv": "cannot read .*empty.csv.* as a table",
    }.items():
        with pytest.raises(PrunekitError, match=said):
            read_documents(tmp_path / name)


def test_a_table_without_text_names_its_columns_and_the_row(tmp_path):
    (tmp_path / "a.csv").write_text("id,body\n1,hello\n")
    with pytest.raises(PrunekitError, match=r"a.csv, row 1: no text in a record with id, body; give"):
        read_documents(tmp_path / "a.csv")
    with pytest.raises(PrunekitError, match="of its parts 'train' give one"):
        read_documents(datasets.DatasetDict(train=datasets.Dataset.from_list(RECORDS)))


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT},
        {"conversations": SHAREGPT},
        {"conversations": CHAT},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        CHAT,
    ],
    ids=["messages", "ShareGPT", "conversations of messages", "prompt and completion", "a list of turns"],
)
def test_chats_are_written_in_the_tokenizers_template(tmp_path, tokenizer, record):
    assert read_documents([record], tokenizer=tokenizer) == [WRITTEN]
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    assert read_documents(tmp_path / "a.jsonl", tokenizer=tokenizer) == [WRITTEN]


def test_a_prompt_and_its_completion_are_joined():
    assert read_documents([{"prompt": "a is", "completion": " b"}]) == ["a is b"]


def test_a_chat_that_cannot_be_written_is_refused(tokenizer):
    with pytest.raises(PrunekitError, match="no tokenizer was given"):
        read_documents([{"messages": CHAT}])
    with pytest.raises(PrunekitError, match="a turn of a chat is .* give one with 'from' and 'value'"):
        read_documents([{"conversations": ["how?"]}], tokenizer=tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(PrunekitError, match="refuses this chat, whose roles are user, assistant, and says 'roles must"):
        read_documents([{"messages": CHAT}], tokenizer=tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(PrunekitError, match="this tokenizer has no chat template"):
        read_documents([{"messages": CHAT}], tokenizer=tokenizer)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "a", "completion": None},
        {"prompt": "a", "completion": CHAT},
        {"messages": 3},
        {"messages": [{"role": ["x"], "content": "a"}]},
        {"messages": ["how?"]},
        {"instruction": "a", "output": None},
        {"text": None},
    ],
)
def test_records_that_are_no_text_are_refused(tokenizer, record):
    with pytest.raises(PrunekitError, match="no text in a record with|a turn of a chat is"):
        read_documents([record], tokenizer=tokenizer)


def test_an_iterator_that_was_read_before_says_so(tokenizer):
    texts = iter(["w2 w3 w4 w5 " * 9])
    pk.calibration_set(texts, tokenizer, n_samples=1, seq_len=4)
    with pytest.raises(PrunekitError, match="where it was read before, give a list"):
        pk.calibration_set(texts, tokenizer, n_samples=1, seq_len=4)


def test_bos_that_the_template_writes_stands_once_in_a_window(tokenizer):
    tokenizer.chat_template = "<s> {% for m in messages %}{{ m['content'] }} {% endfor %}"
    chat = [{"role": "user", "content": "w2 w3 w4 w5"}]
    (window,) = pk.calibration_set([{"messages": chat}], tokenizer, n_samples=1, seq_len=5, bos=True)
    assert window.tolist() == [0, 2, 3, 4, 5]


def test_token_ids_are_documents_in_every_form(tokenizer):
    ids = torch.arange(1, 13).view(2, 6)
    padded = {"input_ids": torch.nn.functional.pad(ids, (2, 0)), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    padded["attention_mask"][:, :2] = 0
    sources = [
        ids,
        ids.numpy(),
        ids.tolist(),
        datasets.Dataset.from_dict({"input_ids": ids.tolist()}),
        torch.utils.data.DataLoader(ids, batch_size=2),
        [padded],
    ]
    for source in sources:
        assert [row.tolist() for row in documents_of(source)] == ids.tolist()
        made = pk.calibration_set(source, None, n_samples=2, seq_len=6, seed=0)
        assert sorted(made.flatten().tolist()) == list(range(1, 13))
        if not isinstance(source, torch.Tensor):
            assert training_windows(source, None, 6).tokens.equal(ids)
    with pytest.raises(PrunekitError, match="holds token ids, and text is needed here"):
        read_documents(ids)
    with pytest.raises(PrunekitError, match="token ids are integers"):
        list(documents_of([torch.ones(2, 3)]))
    with pytest.raises(PrunekitError, match="token ids are integers"):
        list(documents_of([[[1, 2], [3]]]))


def test_a_stream_is_read_only_as_far_as_needed(tokenizer):
    n_read = itertools.count()

    def endless():
        while True:
            next(n_read)
            yield {"text": "w2 w3 w4 w5 " * 10}

    made = pk.calibration_set(datasets.IterableDataset.from_generator(endless), tokenizer, n_samples=2, seq_len=16)
    assert made.shape == (2, 16)
    assert next(n_read) < 20  # 16 times the tokens that were drawn, of 40 each
    model = pk.load("world")[0]
    method = pk.LoRA(max_steps=2, batch_size=2, seq_len=16)
    small = pk.recover(model, method, iter(endless()), tokenizer=tokenizer)
    assert len(small.recovery_log.losses) == 2
    assert next(n_read) < 30
    loader = torch.utils.data.DataLoader(datasets.IterableDataset.from_generator(endless_ids), batch_size=None)
    assert pk.calibration_set(loader, None, n_samples=1, seq_len=8).shape == (1, 8)
    assert next(n_read) < 60


def endless_ids():
    while True:
        yield {"input_ids": [2, 3, 4, 5, 6, 7]}
