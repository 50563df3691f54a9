"""Training on chats: the loss is that of the replies alone, by the template's own marks or by what a turn adds."""

import copy
import json

import pytest
import torch
from test_data_matrix import MESSAGES, PAIRS, SHAREGPT, TEXTS, checkpoint, model, tokenizer, turns  # noqa: F401

import prunekit as pk
from prunekit.cli import main
from prunekit.documents import documents_of
from prunekit.errors import PrunekitError
from prunekit.recovery import mixture
from prunekit.recovery.data import IGNORED, TrainingWindows, training_windows

MARKED = (
    "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }} </s>{% endgeneration %}{% else %}{{ m['content'] }} </s>{% endif %} {% endfor %}"
)
PROMPTED = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
HISTORY_REWRITTEN = (  # as Qwen3's: only the last reply is written with (here empty) thoughts
    "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' and loop.last %}w58 w59 {% endif %}"
    "{{ m['content'] }} </s>\n{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
LONG = [  # two questions, two answers
    {"role": "user", "content": "w2 w3"},
    {"role": "assistant", "content": "w4 w5 w6"},
    {"role": "user", "content": "w7"},
    {"role": "assistant", "content": "w8 w9"},
]


def with_template(tokenizer, template):  # noqa: F811
    made = copy.deepcopy(tokenizer)
    made.chat_template = template
    return made


def trained_words(data, tokenizer, **options):  # noqa: F811
    """The words that the loss is taken over, in windows of one size."""
    windows = training_windows(data, tokenizer, 3, **options)
    kept = windows.labels != IGNORED
    assert windows.labels[kept].equal(windows.tokens[kept])
    return tokenizer.convert_ids_to_tokens(windows.labels[kept])


@pytest.mark.parametrize("template", [MARKED, PROMPTED], ids=["generation marks", "generation prompt"])
def test_the_replies_and_their_ends_are_trained_on(tokenizer, template):  # noqa: F811
    made = with_template(tokenizer, template)
    assert trained_words([{"messages": LONG}], made) == ["w4", "w5", "w6", "</s>", "w8", "w9", "</s>"]
    shareGPT = [{"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]} for t in LONG]
    assert trained_words([{"conversations": shareGPT}], made) == trained_words([{"messages": LONG}], made)


def test_a_header_that_the_template_cannot_ask_with_is_no_reply(tokenizer):  # noqa: F811
    """Without a generation prompt a turn is its content and its end."""
    assert trained_words([{"messages": LONG}], tokenizer) == ["w4", "w5", "w6", "</s>", "w8", "w9", "</s>"]


def test_templates_that_rewrite_earlier_replies_are_read_by_content(tokenizer):  # noqa: F811
    made = with_template(tokenizer, HISTORY_REWRITTEN)
    words = trained_words([{"messages": LONG}], made)
    assert words == ["w4", "w5", "w6", "</s>", "w58", "w59", "w8", "w9", "</s>"]


def test_a_template_that_hides_its_replies_is_refused_and_all_is_trained_on_where_asked(tokenizer):  # noqa: F811
    made = with_template(tokenizer, "{{ messages | length }} {% for m in messages %}{{ m['content'] }} {% endfor %}")
    with pytest.raises(PrunekitError, match="does not show where the reply 'w4 w5 w6' ends.*give train_on='all'"):
        training_windows([{"messages": LONG}], made, 4)
    assert len(training_windows([{"messages": LONG}], made, 4, train_on="all"))


def test_completions_and_outputs_are_replies_and_plain_text_is_all_trained_on(tokenizer):  # noqa: F811
    pairs = [{"prompt": p, "completion": c} for p, c in zip(PAIRS["prompt"], PAIRS["completion"], strict=True)]
    replies = [word for text in TEXTS for word in turns(text)[1].split()]
    windows = training_windows(pairs, tokenizer, 8)
    trained = tokenizer.convert_ids_to_tokens(windows.labels[windows.labels != IGNORED])
    assert trained == replies[: len(trained)] and len(trained) > 80
    alpaca = [{"instruction": "w2", "output": "w3 w4 w5"}]
    assert trained_words(alpaca, tokenizer) == ["w3", "w4", "w5"]
    whole = training_windows(TEXTS, tokenizer, 8)
    assert whole.labels[:, 1:].equal(whole.tokens[:, 1:]) and len(whole) > len(windows)


def test_windows_without_a_reply_are_left_out_and_chats_without_one_refused(tokenizer):  # noqa: F811
    long_question = [{"role": "user", "content": "w2 " * 40}, {"role": "assistant", "content": "w3"}]
    assert len(training_windows([{"messages": long_question}], tokenizer, 6, train_on="all")) > 5
    assert len(training_windows([{"messages": long_question * 4}], tokenizer, 6)) <= 8
    with pytest.raises(PrunekitError, match="none of the .* windows of 6 tokens holds a token of a reply"):
        training_windows([{"messages": long_question[:1]}], tokenizer, 6)
    with pytest.raises(PrunekitError, match="train_on='reply' is unknown; allowed: 'replies', 'all'"):
        training_windows(TEXTS, tokenizer, 6, train_on="reply")


@pytest.mark.parametrize("method", [pk.LoRA, pk.FullTuning])
def test_the_loss_is_that_of_the_replies_alone(method, model, tokenizer):  # noqa: F811
    """The first loss of the curve, computed by hand over the tokens of replies; prompts do not enter it."""
    how = method(max_steps=1, batch_size=8, seq_len=8, **({"dropout": 0.0} if method is pk.LoRA else {}))
    windows = training_windows([{"messages": chat} for chat in MESSAGES], tokenizer, 8)[:8]
    with torch.no_grad():
        logits = model(input_ids=windows.tokens).logits[:, :-1].flatten(0, 1)
    each = torch.nn.functional.cross_entropy(logits, windows.tokens[:, 1:].flatten(), reduction="none")
    is_reply = (windows.labels[:, 1:] != IGNORED).flatten()
    assert 0 < is_reply.sum() < len(is_reply)
    of_all = TrainingWindows(windows.tokens, windows.tokens)
    losses = [pk.recover(model, how, data).recovery_log.losses[0] for data in (windows, of_all)]
    assert losses == pytest.approx([each[is_reply].mean().item(), each.mean().item()], abs=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3


def test_prompts_have_no_gradient(model, tokenizer):  # noqa: F811
    """A prompt token's label changes nothing."""
    windows = training_windows([{"messages": chat} for chat in MESSAGES], tokenizer, 8)
    how = pk.FullTuning(max_steps=3, batch_size=4, learning_rate=1e-2)
    first = pk.recover(model, how, windows)
    everything = pk.recover(model, how, TrainingWindows(windows.tokens, windows.tokens))
    again = pk.recover(model, how, [{"conversations": chat} for chat in SHAREGPT], tokenizer=tokenizer, seq_len=8)
    one, two, three = (done.lm_head.weight for done in (first, everything, again))
    assert one.equal(three) and not one.equal(two)


@pytest.mark.parametrize("train_on", ["replies", "all"])
def test_a_mixture_trains_on_the_replies_of_each_source(train_on, model, tokenizer, monkeypatch):  # noqa: F811
    """Prompts are read in the windows of chats and not trained on; a source of plain text is, whole."""
    trained, real = [], mixture.recover
    monkeypatch.setattr(mixture, "recover", lambda m, how, data, **o: trained.append(data) or real(m, how, data, **o))
    sources = {"chats": [{"messages": chat} for chat in MESSAGES * 4], "text": TEXTS * 4}
    how = pk.FullTuning(max_steps=2, batch_size=8, seq_len=8)
    options = {"tokenizer": tokenizer} | ({"train_on": "all"} if train_on == "all" else {})
    pk.recover_on_mixture(model, model, sources, how, pk.Mixture(n_rounds=2, uniform_share=1.0), **options)
    assert len(trained) == 2
    prompt = tokenizer.convert_tokens_to_ids("<assistant>")
    for windows in trained:
        kept = windows.labels != IGNORED
        assert windows.labels[kept].equal(windows.tokens[kept]) and (windows.tokens == prompt).any()
        assert (prompt in windows.labels[kept]) == (train_on == "all")
        assert kept[:, 1:].all() == (train_on == "all")


def test_a_mixture_refuses_a_source_without_replies(model, tokenizer):  # noqa: F811
    asked = [{"messages": [{"role": "user", "content": text}]} for text in TEXTS]
    with pytest.raises(PrunekitError, match="source 'asked' has no token of a reply.*train_on='all'"):
        pk.recover_on_mixture(
            model, model, {"asked": asked}, pk.FullTuning(max_steps=4, seq_len=8), tokenizer=tokenizer
        )
    with pytest.raises(PrunekitError, match="train_on='reply' is unknown|train_on='reply' is not allowed"):
        pk.recover_on_mixture(model, model, {"a": TEXTS}, tokenizer=tokenizer, train_on="reply")


@pytest.mark.slow
def test_the_shell_trains_on_replies_and_on_all_where_asked(checkpoint, tokenizer, tmp_path, capsys):  # noqa: F811
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in MESSAGES * 4))
    told = ["--data", str(path), "--max-steps", "2", "--seq-len", "8", "--dtype", "float32", "--json"]
    found = {}
    for train_on in ("replies", "all"):
        out = tmp_path / train_on
        assert main(["recover", str(checkpoint), *told, "--train-on", train_on, "--out", str(out)]) == 0
        found[train_on] = json.loads(capsys.readouterr().out)["loss_first"]
    assert main(["recover", str(checkpoint), *told, "--out", str(tmp_path / "default")]) == 0
    assert json.loads(capsys.readouterr().out)["loss_first"] == found["replies"] != found["all"]


def test_a_chat_is_not_split_at_a_separator_that_ends_its_turns(tokenizer):  # noqa: F811
    made = with_template(tokenizer, "{% for m in messages %}{{ m['content'] }} <|endoftext|>{% endfor %}")
    (whole,) = documents_of([{"messages": LONG}], made, separator="<|endoftext|>")
    assert whole.count("<|endoftext|>") == 4


def test_labels_are_cast_as_tokens_are(model):  # noqa: F811
    ids = torch.randint(3, 20, (2, 8), dtype=torch.int32)
    assert pk.recover(model, pk.LoRA(max_steps=1), ids)
    with pytest.raises(PrunekitError, match=r"have shapes \(2, 8\) and \(2, 7\); give one label a token"):
        pk.recover(model, pk.LoRA(max_steps=1), TrainingWindows(ids, ids[:, 1:]))


def test_a_subclass_of_a_method_trains_as_that_does(model):  # noqa: F811
    class Own(pk.LoRA):
        pass

    assert pk.recover(model, Own(max_steps=1), torch.randint(3, 20, (2, 8)))
