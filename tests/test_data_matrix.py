"""Every form of data × every use of data: the tokens of the plain list of texts, or a refusal that names the form."""

import codecs
import gzip
import json
import logging

import datasets
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import prunekit as pk
from prunekit.cli import main
from prunekit.documents import documents_of
from prunekit.errors import PrunekitError
from prunekit.evaluation.windows import read_spans
from prunekit.knowledge.question_spans import make_evaluation_set
from prunekit.recovery.data import training_windows

WORDS = [f"w{number}" for number in range(1, 60)]
TEXTS = [" ".join(WORDS[(7 * n + 3 * i * i) % 59] for i in range(9 + n)) for n in range(12)]
RECORDS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
TABLE = pd.DataFrame(RECORDS)
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s>\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    """Words, and BOS by itself; white space makes no tokens, so that joined token ids are those of joined texts."""
    words = {word: number for number, word in enumerate(["<s>", *WORDS, "</s>", "<user>", "<assistant>"])}
    made = Tokenizer(models.WordLevel(words, "w1"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            intermediate_size=12,
            vocab_size=64,
        )
    ).eval()


@pytest.fixture(scope="module")
def checkpoint(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


FILES = {
    "a.txt": "\n".join(TEXTS),
    "a.json": json.dumps(RECORDS),
    "lines.json": LINES,
    "a.jsonl": LINES,
    "a.ndjson": LINES,
    "a.csv": TABLE.to_csv(index=False),
    "semicolons.csv": TABLE.to_csv(index=False, sep=";"),
    "a.tsv": TABLE.to_csv(index=False, sep="\t"),
    "a.parquet": TABLE.to_parquet(),
}
MARKS = {"": b"", "utf-8 mark": codecs.BOM_UTF8, "utf-16 mark": codecs.BOM_UTF16_LE}
FILE_FORMS = [
    (name.upper() if upper else name, mark, packed)
    for name in FILES
    for mark in MARKS
    for packed in (False, True)
    for upper in (False, True)
    if not (mark and (name == "a.parquet" or upper))
]


def written(folder, name, mark, packed):
    """A file of this form."""
    content = FILES[name.lower()]
    if isinstance(content, str):
        content = MARKS[mark] + content.encode("utf-16-le" if mark == "utf-16 mark" else "utf-8")
    path = folder / (name + (".GZ" if name.isupper() else ".gz") * packed)
    path.write_bytes(gzip.compress(content) if packed else content)
    return str(path)


def turns(text):
    """A chat of two turns."""
    half = len(text.split()) // 2
    return " ".join(text.split()[:half]), " ".join(text.split()[half:])


MESSAGES = [[{"role": r, "content": c} for r, c in zip(("user", "assistant"), turns(t), strict=True)] for t in TEXTS]
SHAREGPT = [[{"from": r, "value": c} for r, c in zip(("human", "gpt"), turns(t), strict=True)] for t in TEXTS]
CHATS = {
    "messages": {"messages": MESSAGES},
    "conversations": {"conversations": SHAREGPT},
    "prompt and completion": {
        "prompt": [chat[:1] for chat in MESSAGES],
        "completion": [chat[1:] for chat in MESSAGES],
    },
}
WRITTEN_CHATS = ["<user> {} </s>\n<assistant> {} </s>".format(*turns(text)) for text in TEXTS]
PAIRS = {"prompt": [turns(text)[0] + " " for text in TEXTS], "completion": [turns(text)[1] for text in TEXTS]}


def ids_of(texts, tokenizer):
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def padded(rows, side):
    """A batch as a collator with padding makes it."""
    width = max(map(len, rows))
    pads = [[59] * (width - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    zeros = [[0] * len(pad) for pad in pads]
    joined = [
        (p + r, z + o) if side == "left" else (r + p, o + z) for p, r, z, o in zip(pads, rows, zeros, ones, strict=True)
    ]
    ids, mask = zip(*joined, strict=True)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


IN_MEMORY = {
    "list of texts": lambda t: TEXTS,
    "tuple of texts": lambda t: tuple(TEXTS),
    "generator of texts": lambda t: iter(TEXTS),
    "list of records": lambda t: RECORDS,
    "DataFrame": lambda t: TABLE,
    "Series": lambda t: TABLE["text"],
    "Dataset": lambda t: datasets.Dataset.from_list(RECORDS),
    "column of a Dataset": lambda t: datasets.Dataset.from_list(RECORDS)["text"],
    "IterableDataset": lambda t: datasets.Dataset.from_list(RECORDS).to_iterable_dataset(),
    "DataLoader of texts": lambda t: DataLoader(TEXTS, batch_size=5),
    "DataLoader of records": lambda t: DataLoader(RECORDS, batch_size=5),
    "prompts and completions": lambda t: datasets.Dataset.from_dict(PAIRS),
    "lists of ids": lambda t: ids_of(TEXTS, t),
    "Dataset of input_ids": lambda t: datasets.Dataset.from_dict({"input_ids": ids_of(TEXTS, t)}),
    "Dataset of input_ids for torch": lambda t: datasets.Dataset.from_dict({"input_ids": ids_of(TEXTS, t)}).with_format(
        "torch"
    ),
    "IterableDataset of input_ids": lambda t: datasets.Dataset.from_dict(
        {"input_ids": ids_of(TEXTS, t)}
    ).to_iterable_dataset(),
    "DataFrame of input_ids": lambda t: pd.DataFrame({"input_ids": ids_of(TEXTS, t)}),
    "DataLoader of input_ids, padded left": lambda t: DataLoader(
        ids_of(TEXTS, t), batch_size=5, collate_fn=lambda rows: padded(rows, "left")
    ),
    "batches of ids, padded right": lambda t: iter([padded(ids_of(TEXTS, t), "right")]),
}


def calibration(source, model, tokenizer):
    return pk.calibration_set(source, tokenizer, n_samples=5, seq_len=8).tolist()


def recovery(source, model, tokenizer):
    windows = training_windows(source, tokenizer, 8, train_on="all")
    assert windows.labels[:, 1:].equal(windows.tokens[:, 1:])
    return windows.tokens.tolist()


def perplexity(source, model, tokenizer):
    return read_spans(model, tokenizer, source, window=8).spans


def knowledge(source, model, tokenizer):
    return make_evaluation_set(model, tokenizer, None, {"mine": source}).spans


USES = {use.__name__: use for use in (calibration, recovery, perplexity, knowledge)}


@pytest.fixture(scope="module")
def expected(model, tokenizer):
    """(use, texts) → what the plain list of texts gives."""
    kept = {}

    def of(use, texts):
        key = use, tuple(texts)
        if key not in kept:
            kept[key] = USES[use](list(texts), model, tokenizer)
        return kept[key]

    return of


@pytest.mark.parametrize(
    ("form", "use"),
    [(form, use) for form in FILE_FORMS for use in (USES if not any(form[1:]) else ["calibration"])],
    ids=lambda part: part if isinstance(part, str) else " ".join(map(str, part)),
)
def test_files(form, use, model, tokenizer, tmp_path, expected):
    texts = [FILES["a.txt"]] if form[0].lower() == "a.txt" else TEXTS
    assert USES[use](written(tmp_path, *form), model, tokenizer) == expected(use, texts)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("form", IN_MEMORY)
def test_data_in_memory(form, use, model, tokenizer, expected):
    assert USES[use](IN_MEMORY[form](tokenizer), model, tokenizer) == expected(use, TEXTS)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "Dataset", "IterableDataset", "DataFrame"])
@pytest.mark.parametrize("form", CHATS)
def test_chats(form, kind, use, model, tokenizer, tmp_path, expected):
    made = datasets.Dataset.from_dict(CHATS[form])
    path = str(tmp_path / f"a.{kind}")
    if kind in ("jsonl", "parquet"):
        (made.to_json if kind == "jsonl" else made.to_parquet)(path)
    frame = pd.read_parquet(path) if kind == "parquet" else made.to_pandas()
    sources = {"Dataset": made, "IterableDataset": made.to_iterable_dataset(), "DataFrame": frame}
    assert USES[use](sources.get(kind, path), model, tokenizer) == expected(use, WRITTEN_CHATS)


def plan_by_streaming(folder, calib, out):
    return pk.prune_checkpoint(folder, out, pk.Activation(), 0.2, calib).keep


@pytest.mark.parametrize("name", ["a.txt", "A.TSV", "messages"])
def test_streaming_draws_the_same_windows(name, checkpoint, tokenizer, tmp_path, capsys):
    path = written(tmp_path, name, "", name.startswith("A")) if name != "messages" else str(tmp_path / "chats.jsonl")
    if name == "messages":
        datasets.Dataset.from_dict(CHATS["messages"]).to_json(path)
    plain = {"a.txt": [FILES["a.txt"]], "messages": WRITTEN_CHATS}.get(name, TEXTS)
    drawing = {"n_samples": 5, "seq_len": 8}
    kept = plan_by_streaming(checkpoint, pk.calibration_set(plain, tokenizer, **drawing), tmp_path / "library")
    told = ["--n-samples", "5", "--seq-len", "8", "--importance", "activation", "--pruning-ratio", "0.2"]
    out = tmp_path / "shell"
    assert main(["prune", str(checkpoint), "--streaming", "--calibration", path, *told, "--out", str(out)]) == 0
    assert pk.PruningPlan.load(out / "plan.json").keep == kept
    count = f"{len(plain)} document{'s' * (len(plain) > 1)}"
    column = {"a.txt": "", "messages": " (from messages)"}.get(name, " (from text)")
    assert f"prunekit: calibration read {count}{column} of {path}" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["list of texts", "DataFrame", "Dataset of input_ids", "float ids"])
def test_streaming_takes_windows_of_every_form(form, checkpoint, tokenizer, tmp_path):
    """Streaming reads integers (n, seq_len); whatever else it is given is refused by what it is."""
    if form == "float ids":
        with pytest.raises(PrunekitError, match="a calibration set is an integer tensor .* not torch.float32"):
            plan_by_streaming(checkpoint, torch.ones(2, 8), tmp_path / "out")
        return
    calib = calibration(IN_MEMORY[form](tokenizer), None, tokenizer)
    assert calib == calibration(TEXTS, None, tokenizer)
    if not isinstance(source := IN_MEMORY[form](tokenizer), torch.Tensor):
        with pytest.raises(PrunekitError, match="calib"):
            plan_by_streaming(checkpoint, source, tmp_path / "out")


def _file(name, content):
    def make(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(folder / name)

    return make


REFUSED = {
    "a table without text": (_file("a.csv", "id,body\n1,w2\n"), "a.csv, row 1: no text in a record with id, body"),
    "a table whose chats are JSON": (
        _file("a.csv", f'messages\n"{json.dumps(MESSAGES[0]).replace(chr(34), chr(34) * 2)}"\n'),
        "a.csv, row 1: no text in a record with messages",
    ),
    "a workbook": (_file("a.xlsx", b"PK\x03\x04\0\0"), "a.xlsx.*it is no text; give .txt, .json"),
    "a pickle": (_file("a.pt", b"\x80\x04\x95\0\0"), "a.pt.*it is no text; give .txt, .json"),
    "a zip": (_file("a.zip", b"PK\x03\x04\0\0"), "a.zip.*it is no text; give .txt, .json"),
    "bytes that are no UTF-8": (_file("a.jsonl", b'{"text": "\xe9"}\n'), "a.jsonl.*in UTF-8"),
    "half a line of JSON": (_file("a.ndjson", '{"text": "w2'), "a.ndjson, line 1: this is no JSON"),
    "a Parquet file of numbers": (
        lambda folder: (pd.DataFrame({"n": [1]}).to_parquet(folder / "a.parquet"), str(folder / "a.parquet"))[1],
        "a.parquet, row 1: no text in a record with n",
    ),
    "a DatasetDict": (
        lambda _: datasets.DatasetDict(train=datasets.Dataset.from_list(RECORDS)),
        "of its parts 'train'",
    ),
    "a DataFrame without text": (lambda _: pd.DataFrame({"body": TEXTS}), "no text in a record with body"),
    "numbers": (lambda _: 3, "cannot read documents from 3|source=3 is not allowed"),
    "a ragged batch": (lambda _: [[[1, 2], [3]]], "token ids are integers"),
    "embeddings": (lambda _: [torch.ones(2, 3)], "token ids are integers"),
    "a chat without an answerable turn": (lambda _: [{"messages": ["w2"]}], "a turn of a chat is 'w2'"),
    "a missing file": (lambda _: "nowhere/a.jsonl", "'nowhere/a.jsonl' is not a file that exists"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("form", REFUSED)
def test_what_is_not_understood_is_refused_by_name(form, use, model, tokenizer, tmp_path):
    make, said = REFUSED[form]
    with pytest.raises(PrunekitError, match=said):
        USES[use](make(tmp_path), model, tokenizer)


def test_texts_and_ids_together_are_refused_where_they_are_scored(model, tokenizer):
    mixed = ["w2 w3 w4", torch.tensor([1, 2, 3])]
    assert len(list(documents_of(mixed))) == 2
    with pytest.raises(PrunekitError, match="holds both texts and token ids"):
        pk.perplexity(model, tokenizer, mixed)
    with pytest.raises(PrunekitError, match="separator='x' splits text, and the data is token ids"):
        pk.perplexity(model, tokenizer, [[1, 2, 3]], protocol="documents", separator="x")


def test_token_ids_are_scored_without_a_tokenizer(model, tokenizer):
    rows = ids_of(TEXTS, tokenizer)
    assert pk.perplexity(model, None, rows, window=8) == pytest.approx(
        pk.perplexity(model, tokenizer, TEXTS, window=8, bos=False)
    )


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (TEXTS, "12 documents of a list"),
        (RECORDS, "12 documents (from text) of a list"),
        ("w2 " * 200, "1 document of a text of 600 characters"),
        ([{"messages": chat} for chat in MESSAGES], "12 documents (from messages) of a list"),
        ([[1, 2, 3] * 60], "1 document of a list"),
    ],
)
def test_what_was_read_is_said(source, said, model, tokenizer, caplog):
    caplog.set_level(logging.INFO, "prunekit")
    for use in USES.values():
        use(source, model, tokenizer)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split()[0] for line in lines] == ["calibration", "recovery", "perplexity", "perplexity"]
    assert all(f"read {said}: " in line and line.endswith(" tokens") for line in lines)
