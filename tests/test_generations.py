import pytest
import torch
from evaluation_helpers import N_POSITIONS, byte_tokenizer, gpt2, llama

import prunekit as pk
from prunekit import PrunekitError


@pytest.mark.parametrize("build", [llama, gpt2])
def test_each_model_goes_on_with_its_likeliest_tokens(build):
    model, tokenizer = build(), byte_tokenizer()
    ids = tokenizer("who ran", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        while ids.shape[1] < start + 6 and ids[0, -1] != tokenizer.eos_token_id:
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    found = pk.generations({"dense": model, "other": build(seed=1)}, tokenizer, ["who ran", "a"], max_new_tokens=6)
    assert list(found.table) == ["prompt", "dense", "other"] and list(found.table["prompt"]) == ["who ran", "a"]
    assert found.table.loc[0, "dense"] == tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert found.table.loc[0, "dense"] != found.table.loc[0, "other"]
    assert pk.generations({"dense": model}, tokenizer, "who ran", max_new_tokens=6).table.shape == (1, 2)


def test_what_is_written_is_shown_as_text():
    class Echo:
        pad_token_id, eos_token_id = None, 1

        def __call__(self, text, **_):
            return {"input_ids": torch.tensor([[5, 6]])}

        def decode(self, tokens, skip_special_tokens):
            return "<b>&\nend"

    found = pk.generations({"<i>": llama()}, Echo(), ["<p>"], max_new_tokens=2)
    html = found._repr_html_()
    assert "&lt;b&gt;&amp;\nend" in html and "&lt;p&gt;" in html and "&lt;i&gt;" in html and "<b>" not in html
    assert "pre-wrap" in html and repr(found) == "<p>\n  <i>: '<b>&\\nend'"


def test_a_training_model_stays_one_and_writes_without_dropout():
    model = gpt2().train()
    written = pk.generations({"m": model}, byte_tokenizer(), "ab", max_new_tokens=8).table["m"].tolist()
    assert (
        model.training
        and written == pk.generations({"m": model.eval()}, byte_tokenizer(), "ab", max_new_tokens=8).table["m"].tolist()
    )


REFUSED = {
    "no model": ({"models": {}}, "give a dictionary|give at least one, by name"),
    "a list": ({"models": [1]}, "give a dictionary|give at least one, by name"),
    "a reserved name": ({"models": {"prompt": None}}, '"prompt" is no name|models\\[.prompt.\\]=None is not allowed'),
    "no prompt": ({"prompts": []}, "at least one text"),
    "empty prompt": ({"prompts": ["a", ""]}, "prompts: ''"),
    "no tokens": ({"max_new_tokens": 0}, "max_new_tokens=0"),
    "too long": ({"prompts": "x" * N_POSITIONS}, f"97 tokens and 5 more are beyond the {N_POSITIONS}"),
    "another tokenizer": ({"models": {"a": llama(vocab_size=40)}}, "belongs to another model"),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused(given, message):
    given = {"models": {"a": llama()}, "prompts": ["a"], "max_new_tokens": 5} | given
    with pytest.raises(PrunekitError, match=message):
        pk.generations(given["models"], byte_tokenizer(), given["prompts"], max_new_tokens=given["max_new_tokens"])
