"""The knowledge lab: what a question needs, sets of units ablated, attention, exciting tokens, models compared."""

import inspect

import numpy as np
import pandas as pd
import pytest
import torch
from evaluation_helpers import TEXT, byte_tokenizer, choice_task, gpt2, llama, sums_alone
from families import FAMILIES
from test_knowledge import by_hand, unchanged, weights

import prunekit as pk
from prunekit import PrunekitError
from prunekit.compat import cache_name
from prunekit.evaluation.likelihood import Span
from prunekit.evaluation.multiple_choice import question_spans
from prunekit.importance.ablation import ablated
from prunekit.knowledge import domain_needs, question_needs, side_by_side_answers
from prunekit.knowledge.ablation_sets import units_named
from prunekit.knowledge.asking import span_sums_of
from prunekit.questions import Question

ANIMALS = (" a cat", " bees", " an old grey dog")


@pytest.fixture(scope="module")
def small():
    model = llama()
    return model, byte_tokenizer(), pk.discover(model)


def ids_of(tokenizer, text):
    return tokenizer(text, return_tensors="pt")["input_ids"]


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


# --- what one question needs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "measure"), [(llama, "choices"), (gpt2, "answer")])
def test_needs_are_those_of_zeroed_weights(build, measure):
    model, tokenizer = build(), byte_tokenizer()
    groups, before = pk.discover(model), weights(model)
    chosen = groups.of_kind("kv_head", "query_head", "ffn_channel", "block", "layer", "hidden")
    table = pk.needs(model, tokenizer, "who ran?", ANIMALS[1], groups=chosen, choices=ANIMALS, measure=measure)
    assert unchanged(model, before) and not any(module._forward_pre_hooks for module in model.modules())
    assert len(table) == sum(group.n_units if group.n_units <= 64 else 1 for group in chosen)
    spans = question_spans(tokenizer, Question("who ran?", ANIMALS, 1, ""), None, "")

    def score():
        sums = sums_alone(model, spans)
        return float(sums[1] if measure == "answer" else sums.log_softmax(0)[1])

    dense = score()
    assert table["dense"].to_numpy() == pytest.approx(dense, abs=1e-4)
    for row in table.iloc[:: len(table) // 40 + 1].itertuples():
        group = groups[row.group]
        with ablated(model, group, range(group.n_units) if pd.isna(row.unit) else [row.unit]):
            assert row.fall == pytest.approx(dense - score(), abs=2e-4)
    assert (table["fall"].diff().dropna() <= 0).all() and table["fall"].abs().max() > 0.01


@pytest.mark.parametrize("name", ["llama_gqa", "gemma3", "mixtral", "gpt_neox", "olmo2", "bloom", "opt_projected"])
def test_needs_of_families_are_those_of_zeroed_weights(name, monkeypatch):
    """Inexact groups, stacked experts and parallel blocks: rows of a batch, or one after another."""
    family = FAMILIES[name]
    model, groups = family.model(), family.groups()
    span = Span(tuple(range(3, 11)), 5)
    rows = [*question_needs._rows(groups.of_kind("kv_head", "query_head", "ffn_channel", "expert"))]
    with torch.no_grad():
        values = question_needs._values(model, [span], 0, rows)
        for value, row in [*zip(values, rows, strict=True)][:: len(rows) // 12 + 1]:
            with ablated(model, row.group, row.units):
                assert value == pytest.approx(float(sums_alone(model, [span])[0]), abs=1e-4)


def test_large_groups_go_as_a_whole_and_the_channels_that_matter_most_alone(small, monkeypatch):
    model, tokenizer, groups = small
    monkeypatch.setattr(question_needs, "SINGLE", 8)
    ffns = groups.of_kind("ffn_channel")
    table = pk.needs(model, tokenizer, "who ran?", " a cat", groups=ffns, channels=5)
    whole, single = table[table["unit"].isna()], table[table["unit"].notna()]
    assert len(whole) == len(ffns) and len(single) == 5
    with ablated(model, ffns[1], range(ffns[1].n_units)):
        value = float(
            sums_alone(model, question_spans(tokenizer, Question("who ran?", (" a cat",), 0, ""), None, ""))[0]
        )
    assert whole.set_index("group").loc[ffns[1].name, "value"] == pytest.approx(value, abs=2e-4)
    monkeypatch.setattr(question_needs, "SINGLE", 64)
    every = pk.needs(model, tokenizer, "who ran?", " a cat", groups=ffns)
    strongest = every["fall"].abs().nlargest(5).sum()
    assert single["fall"].abs().sum() > 0.5 * strongest  # a first-order estimate chose them


def test_one_batch_or_several_give_the_same(small, monkeypatch):
    model, tokenizer, groups = small
    asked = dict(groups=groups.of_kind("kv_head", "ffn_channel"), choices=ANIMALS, measure="choices")
    whole = pk.needs(model, tokenizer, "who ran?", ANIMALS[2], **asked)
    monkeypatch.setattr(question_needs, "POSITIONS", 70)
    again = pk.needs(model, tokenizer, "who ran?", ANIMALS[2], **asked)
    keys = ["group", "unit"]
    joined = whole.merge(again, on=keys)
    assert len(joined) == len(whole)
    np.testing.assert_allclose(joined["value_x"], joined["value_y"], atol=1e-4)


def test_a_question_brings_its_answer_and_single_token_choices_are_run_once(small):
    model, tokenizer, groups = small
    question = choice_task(1).questions[0]
    heads = groups.of_kind("kv_head")
    found = pk.needs(model, tokenizer, question, groups=heads, measure="choices")
    again = pk.needs(
        model, tokenizer, question.context, question.choices[question.answer], groups=heads,
        choices=question.choices, measure="choices",
    )  # fmt: skip
    pd.testing.assert_frame_equal(found, again)
    ran = []
    handle = model.register_forward_pre_hook(lambda *_: ran.append(1))
    spans = question_spans(tokenizer, Question("is it? ", ("y", "n", "m"), 0, ""), None, "")
    with torch.no_grad():
        sums = span_sums_of(model, spans, copies=2)
    handle.remove()
    assert len(ran) == 1
    np.testing.assert_allclose(sums[:, 0], sums_alone(model, spans), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"question": " "}, "the prompt is ' '; write some text"),
        ({"answer": None}, "answer=None; give the text that should follow"),
        ({"choices": [" b"]}, "is not among the choices"),
        ({"choices": None, "measure": "choices"}, "give choices=, or measure='answer'"),
        ({"groups": []}, "no groups to ablate"),
        ({"question": Question("a", (" b",), 0, "")}, "leave out answer="),
        ({"question": "x" * 99}, "takes at most|cut|fits|has 100 tokens"),
    ],
)
def test_bad_questions_are_refused(small, change, says):
    model, tokenizer, groups = small
    good = {"question": "who ran?", "answer": " a", "groups": groups.of_kind("kv_head"), "choices": [" a", " b"]}
    if change.get("question") == "x" * 99:
        good["answer"] = " " + "a" * 200
        good["choices"] = None
    with pytest.raises(PrunekitError, match=says):
        pk.needs(model, tokenizer, **{**good, **change})


# --- sets of units ----------------------------------------------------------------------------------------------------


def some_units(groups):
    heads, ffns = groups.of_kind("kv_head"), groups.of_kind("ffn_channel")
    return {heads[0].name: [1], ffns[0].name: [0, 5], ffns[1].name: range(10, 20), heads[1].name: []}


@pytest.mark.parametrize("mode", ["zero", "mean", "patch"])
def test_a_set_is_ablated_and_all_is_restored_after_an_exception(small, mode):
    model, tokenizer, groups = small
    before, ids = weights(model), ids_of(tokenizer, "the cat sat")
    tokens = {"zero": None, "mean": torch.arange(64).view(4, 16) + 2, "patch": ids_of(tokenizer, "a dog ran.")}[mode]
    plain = logits(model, ids)
    with pytest.raises(ZeroDivisionError), pk.ablate(model, groups, some_units(groups), mode=mode, tokens=tokens):
        assert not torch.allclose(logits(model, ids), plain, atol=1e-3)
        1 / 0  # noqa: B018
    assert unchanged(model, before) and torch.equal(logits(model, ids), plain)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_zero_is_what_zeroed_weights_are(small):
    model, tokenizer, groups = small
    ids, units = ids_of(tokenizer, "the cat sat"), some_units(groups)
    with pk.ablate(model, groups, units):
        found = logits(model, ids)
    heads, ffns = groups.of_kind("kv_head"), groups.of_kind("ffn_channel")
    with ablated(model, heads[0], [1]), ablated(model, ffns[0], [0, 5]), ablated(model, ffns[1], range(10, 20)):
        assert torch.equal(found, logits(model, ids))


def test_mean_puts_the_mean_input_of_the_consumer_layer_there(small):
    model, tokenizer, groups = small
    calib, ids = torch.arange(64).view(4, 16) + 2, ids_of(tokenizer, "the cat sat")
    down, seen = model.model.layers[1].mlp.down_proj, []

    def watched(tokens):
        handle = down.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach().flatten(0, -2)))
        result = logits(model, tokens)
        handle.remove()
        return seen.pop(), result

    mean, own = watched(calib)[0].mean(0), watched(ids)[0]
    with pk.ablate(model, groups, {groups.of_kind("ffn_channel")[1].name: [3, 7]}, mode="mean", tokens=calib):
        got = watched(ids)[0]
    expected = own.clone()
    expected[:, [3, 7]] = mean[[3, 7]]
    torch.testing.assert_close(got, expected)


def test_patches_from_the_same_prompt_change_nothing(small):
    model, tokenizer, groups = small
    ids = ids_of(tokenizer, "the cat sat")
    everything = {group.name: range(group.n_units) for group in groups.of_kind("kv_head", "ffn_channel")}
    with pk.ablate(model, groups, everything, mode="patch", tokens=ids):
        found = logits(model, ids)
    torch.testing.assert_close(found, logits(model, ids), rtol=0, atol=1e-5)


def test_patches_of_everything_are_the_other_prompt_up_to_the_residual_stream(small):
    """With all heads and channels of all layers patched, only the embedding of the prompt itself is left."""
    model, tokenizer, groups = small
    mine, other = ids_of(tokenizer, "the cat sat"), ids_of(tokenizer, "a dog ran a")
    assert mine.shape == other.shape
    everything = {group.name: range(group.n_units) for group in groups.of_kind("kv_head", "ffn_channel")}
    streams = []

    def keep(_module, _args, result):
        streams.append(result[0] if isinstance(result, tuple) else result)

    handle = model.model.layers[-1].register_forward_hook(keep)
    logits(model, other)
    with pk.ablate(model, groups, everything, mode="patch", tokens=other):
        logits(model, mine)
    handle.remove()
    embed = model.model.embed_tokens
    added = streams[0] - embed(other)
    torch.testing.assert_close(streams[-1] - embed(mine), added, rtol=1e-4, atol=1e-4)


def test_a_patch_goes_by_position_with_a_cache_too(small):
    """Token by token with a cache gives what one pass gives; tokens beyond the other prompt keep their own."""
    model, tokenizer, groups = small
    ids, name = ids_of(tokenizer, "the cat sat on"), cache_name(inspect.signature(model.forward).parameters)
    with pk.ablate(model, groups, some_units(groups), mode="patch", tokens=ids_of(tokenizer, "a dog")):
        whole, cache, steps = logits(model, ids), None, []
        with torch.no_grad():
            for place in range(ids.shape[1]):
                out = model(input_ids=ids[:, place : place + 1], use_cache=True, **{name: cache})
                cache = out[name]
                steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


def test_a_patched_model_goes_on_as_it_does_without_a_cache(small):
    model, tokenizer, groups = small
    with pk.ablate(model, groups, some_units(groups), mode="patch", tokens=ids_of(tokenizer, "a dog ran a")):
        said = pk.ask(model, tokenizer, "the cat", max_new_tokens=6).continuation
        ids = ids_of(tokenizer, "the cat")
        for _ in range(6):
            ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    assert said == tokenizer.decode(ids[0, -6:], skip_special_tokens=True)


def test_a_patch_goes_by_position_in_packed_rows(small):
    model, tokenizer, groups = small
    task = choice_task(48)
    with pk.ablate(model, groups, some_units(groups), mode="patch", tokens=ids_of(tokenizer, "Q: what,")):
        result = pk.zero_shot(model, tokenizer, [task])
        spans = [span for q in task.questions for span in question_spans(tokenizer, q, None, "")]
        alone = sums_alone(model, spans)
    found = [value for row in result.questions["log_likelihoods"] for value in row]
    np.testing.assert_allclose(found, alone, atol=2e-3)
    assert result.n_computed < result.n_tokens  # they were packed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"units": {"no": [0]}}, "no group is called 'no'"),
        ({"units": {}}, "no units are named"),
        ({"mode": "mean"}, "mode='mean' needs tokens=: give a calibration set"),
        ({"mode": "patch"}, "needs tokens=: give the other prompt's ids"),
        ({"tokens": torch.ones(1, 4, dtype=torch.long)}, "leave them out of mode='zero'"),
        ({"mode": "patch", "tokens": torch.ones(2, 4, dtype=torch.long)}, "takes one prompt"),
        ({"mode": "soft"}, "mode='soft' is not allowed"),
    ],
)
def test_bad_sets_are_refused_before_anything_is_ablated(small, change, says):
    model, _, groups = small
    given = {"units": {groups.of_kind("kv_head")[0].name: [0]}, **change}
    with pytest.raises(PrunekitError, match=says), pk.ablate(model, groups, **given):
        pass
    name = groups.of_kind("layer")[0].name
    with pytest.raises(PrunekitError, match="use mode='zero' for it"):
        pk.ablate(model, groups, {name: [0]}, mode="mean", tokens=torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(PrunekitError, match="has no unit 9; its units are 0 to 1"):
        pk.ablate(model, groups, {groups.of_kind("kv_head")[0].name: [9]})


def test_units_are_named_by_layer_and_number(small):
    heads = small[2].of_kind("kv_head")
    assert units_named("0.1, 1.0-1,", heads) == {heads[0].name: [1], heads[1].name: [0, 1]}
    assert units_named("1.all, 1.0", heads) == {heads[1].name: [0, 1]} and units_named(" ", heads) == {}
    for text, says in {
        "x": "'x' names no units; write layer.unit", "1": "names no units", "7.0": "no such layer; there are 0, 1",
        "0.2": "has no unit 2", "0.0-9": "has no unit 9", "0.1-0": "", "0.99999999999": "names no units",
    }.items():  # fmt: skip
        if says:
            with pytest.raises(PrunekitError, match=says):
                units_named(text, heads)
        else:
            assert units_named(text, heads) == {}  # a range that holds nothing
    with pytest.raises(PrunekitError, match="layer 0 has 2 groups of this kind"):
        units_named("0.1", [heads[0], heads[0]])


# --- asking -----------------------------------------------------------------------------------------------------------


def test_ask_gives_probabilities_and_the_greedy_continuation(small):
    model, tokenizer, _ = small
    found = pk.ask(model, tokenizer, "who ran?", ANIMALS, max_new_tokens=3)
    sums = sums_alone(model, question_spans(tokenizer, Question("who ran?", ANIMALS, 0, ""), None, ""))
    np.testing.assert_allclose(found.table["log_likelihood"], sums, atol=1e-4)
    assert found.table["probability"].sum() == pytest.approx(1) and found.best == ANIMALS[int(sums.argmax())]
    assert found.continuation == pk.generations({"m": model}, tokenizer, "who ran?", max_new_tokens=3).table["m"][0]
    following = pk.ask(model, tokenizer, "who ran?").table
    row = logits(model, ids_of(tokenizer, "who ran?"))[0, -1].softmax(-1)
    np.testing.assert_allclose(following["probability"], row.topk(5).values, rtol=1e-4)
    both = side_by_side_answers({"dense": found, "cut": found})
    assert both["model"].tolist() == 3 * ["dense"] + 3 * ["cut"]
    with pytest.raises(PrunekitError, match="no answers to compare"):
        side_by_side_answers({})
    with pytest.raises(PrunekitError, match=r"choices=\[\] is empty"):
        pk.ask(model, tokenizer, "who ran?", [])


def test_answers_are_escaped(small):
    model, tokenizer, _ = small
    shown = pk.ask(model, tokenizer, "<script>", ["<b>", " c"])._repr_html_()
    assert "<script>" not in shown and "<b>&lt;b" not in shown and "&lt;script&gt;" in shown and "&lt;b&gt;" in shown


# --- attention and activations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, gpt2])
def test_attention_is_that_of_transformers(build):
    model, tokenizer = build(), byte_tokenizer()
    before = model.config._attn_implementation
    found = pk.attention_pattern(model, tokenizer, "the cat", 1, 3)
    assert model.config._attn_implementation == before
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    ids = ids_of(tokenizer, "the cat")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = model(input_ids=ids, output_attentions=True).attentions[1][0, 3]
    np.testing.assert_allclose(found, theirs, atol=1e-6)
    assert (np.triu(found, 1) == 0).all() and found.index[1] == "1 t" and found.index.is_unique


def test_attention_of_a_cut_model_and_what_is_refused(small):
    model, tokenizer, groups = small
    scores = pk.score(model, groups.of_kind("kv_head"), pk.Magnitude())
    cut = pk.prune(model, pk.plan(groups, scores, 0.5, of="units", kinds=["kv_head"]), measure=False)
    assert pk.attention_pattern(cut, tokenizer, "the cat", 0, 1).shape == (8, 8)
    for (layer, head, text), says in {
        (0, 2, "a"): "head=2 is not in layer 0, whose query heads are 0 to 1",
        (2, 0, "a"): "layer=2 is not in the model, whose layers are 0 to 1",
        (0, 0, ""): "write some text",
        (0, 0, "x" * 200): "has 201 tokens, and at most 96",
    }.items():
        with pytest.raises(PrunekitError, match=says):
            pk.attention_pattern(cut, tokenizer, text, layer, head)


def test_a_layer_without_attention_is_refused_by_name(small, monkeypatch):
    model, tokenizer, _ = small
    monkeypatch.setattr("prunekit.knowledge.asking.written_out", lambda _model: pytest.MonkeyPatch.context())
    with pytest.raises(PrunekitError, match="layer 0 of this LlamaForCausalLM returns no attention weights"):
        pk.attention_pattern(model, tokenizer, "the cat", 0, 0)


def test_exciting_tokens_are_those_that_hooks_see(small):
    model, tokenizer, groups = small
    ffn, heads = groups.of_kind("ffn_channel")[1], groups.of_kind("kv_head")[0]
    found = pk.exciting_tokens(model, tokenizer, [ffn, heads], TEXT, top=4)
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda _m, args, name=name: seen.setdefault(name, []).append(args[0][0]))
        for name, module in {
            "ffn": model.model.layers[1].mlp.down_proj,
            "o": model.model.layers[0].self_attn.o_proj,
        }.items()
    ]
    for window in found.windows:
        logits(model, torch.tensor([window]))
    [hook.remove() for hook in hooks]
    channel = torch.cat(seen["ffn"])[:, 7]
    table = found.table(ffn.name, 7)
    best = channel.abs().topk(4).indices
    np.testing.assert_allclose(table["activation"], channel[best], atol=1e-4)
    flat = [token for window in found.windows for token in window]
    assert table["token"].tolist() == [tokenizer.decode([flat[place]]) for place in best.tolist()]
    row = table.iloc[0]
    window = found.windows[row["window"]]
    assert row["before"] == tokenizer.decode(window[max(row["position"] - 8, 0) : row["position"]])
    columns = [int(i) for m in heads.members if "o_proj" in m.parameter for i in m.index[1]]
    norms = torch.cat(seen["o"])[:, columns].norm(dim=-1)
    np.testing.assert_allclose(found.table(heads.name, 1)["activation"], norms.topk(4).values, atol=1e-4)
    assert "2 groups" in repr(found)


def test_exciting_tokens_in_small_batches_are_the_same(small, monkeypatch):
    model, tokenizer, groups = small
    ffn = groups.of_kind("ffn_channel")[:1]
    tokens = torch.arange(160).view(10, 16) + 2
    whole = pk.exciting_tokens(model, tokenizer, ffn, tokens, top=3)
    monkeypatch.setattr("prunekit.knowledge.exciting.TOKENS_A_BATCH", 40)
    again = pk.exciting_tokens(model, tokenizer, ffn, tokens, top=3)
    assert torch.equal(whole.places[ffn[0].name], again.places[ffn[0].name])
    for (group, unit), says in {
        ("no", 0): "no activations of 'no'",
        (ffn[0].name, 48): "its units are 0 to 47",
    }.items():
        with pytest.raises(PrunekitError, match=says):
            whole.table(group, unit)
    with pytest.raises(PrunekitError, match="no linear layer consumes"):
        pk.exciting_tokens(model, tokenizer, groups.of_kind("layer"), tokens)


# --- models compared --------------------------------------------------------------------------------------------------

ONE = [[1, 1, 1], [1, 3, 1], [1, 1, 3], [1, 3, 3], [1, 1, 5], [9, 9, 9]]
OTHER = [[2, 2, 2], [1, 3, 1], [1, 1, 3], [1, 3, 3], [1, 1, 5], [8, 9, 9]]


def test_a_comparison_by_hand():
    table = pk.compare_knowledge({"dense": by_hand(ONE), "cut": by_hand(OTHER)})
    assert len(table) == 2 * 6 * 2 and set(table["n"]) == {1, 2}
    of_a = table.query("domain == 'a'").set_index(["model", "group", "ratio"])
    first = ("layers.0:kv_head", 0.25)
    assert of_a.loc[("dense", *first), "change"] == 0 and of_a.loc[("cut", *first), "change"] == 1
    assert of_a.loc[("cut", *first), ["moved", "moved_low", "moved_high"]].tolist() == [1, 1, 1]
    last = of_a.loc[("cut", "layers.1:ffn_channel", 0.5)]
    assert last["moved"] == -0.5 and (last["moved_low"], last["moved_high"]) == (-1, 0)
    assert (last["low"], last["high"]) == (7, 8)
    assert (table.query("model == 'dense'")[["moved", "moved_low", "moved_high"]] == 0).all(axis=None)
    pd.testing.assert_series_equal(
        table.query("model == 'dense' and domain == 'a'")["change"].reset_index(drop=True),
        by_hand(ONE).table("domain", "loss").query("domain == 'a'")["change"].reset_index(drop=True),
    )


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Changes drawn around a known mean: the 95% intervals of 200 ablations hold it 9 times in 10 or more."""
    rng = np.random.default_rng(0)
    template = by_hand(ONE)
    ablations = pd.DataFrame([{**template.ablations.iloc[0], "ratio": number / 200} for number in range(1, 201)])
    questions = pd.concat([template.questions.iloc[[0]]] * 60, ignore_index=True)
    loss = 1 + rng.normal(0.3, 1.0, size=(200, 60))
    found = type(template)(ablations, questions, loss < 2, loss, np.ones(60, dtype=bool), np.ones(60), True, True)
    table = pk.compare_knowledge({"dense": found}, n_resamples=400)
    assert 0.88 < ((table["low"] < 0.3) & (table["high"] > 0.3)).mean() < 0.99
    needed = domain_needs(found)["a"]  # the group that was ablated as a whole; those ablated in part are left out
    assert len(needed) == 1 and (needed["low"] <= needed["fall"]).all()


def test_incomparable_distributions_are_refused():
    one, other = by_hand(ONE), by_hand(OTHER)
    other.questions.loc[0, "context"] = "another"
    with pytest.raises(PrunekitError, match="'a' and 'b' were asked different questions"):
        pk.compare_knowledge({"a": one, "b": other})
    apart = by_hand(OTHER)
    apart.ablations["ratio"] *= 0.9
    with pytest.raises(PrunekitError, match="no ablation in common"):
        pk.compare_knowledge({"a": one, "b": apart})
    broken = by_hand([[np.inf, 1, 1], *OTHER[1:]])
    with pytest.raises(PrunekitError, match="'b' has losses that are not finite"):
        pk.compare_knowledge({"a": one, "b": broken})
    assert len(pk.compare_knowledge({"a": one, "b": broken}, measure="accuracy")) == 24
    with pytest.raises(PrunekitError, match="no distributions"):
        pk.compare_knowledge({})


# --- a real model -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_model_needs_the_head_that_every_text_needs(smollm2):
    """Head 1.1 of SmolLM2, as `benchmarks/results/needs_smollm2.csv` has it; and the zeroed weights agree."""
    model, tokenizer = smollm2
    groups = pk.discover(model)
    some = [group for group in groups.of_kind("kv_head", "ffn_channel") if group.layer in (0, 1, 11)]
    table = pk.needs(model, tokenizer, "The capital of France is", " Paris", groups=some)
    best = table[table["kind"] == "kv_head"].iloc[0]
    assert (best["layer"], best["unit"]) == (1, 1) and best["fall"] > 5
    with ablated(model, groups[best["group"]], [1]):
        value = pk.ask(model, tokenizer, "The capital of France is", [" Paris"]).table["log_likelihood"][0]
    assert best["value"] == pytest.approx(value, abs=1e-3)
    pattern = pk.attention_pattern(model, tokenizer, "The capital of France is", 5, 8)
    np.testing.assert_allclose(pattern.sum(axis=1), 1, atol=1e-4)


def test_small_groups_name_each_unit_once_and_long_questions_are_refused(small):
    model, tokenizer, groups = small
    table = pk.needs(model, tokenizer, "who ran?", " a cat", groups=groups.of_kind("ffn_channel"), channels=5)
    assert not table.duplicated(["group", "unit"]).any()
    with pytest.raises(PrunekitError, match="shorten it"):
        pk.needs(model, tokenizer, "who ran? " * 2000, " a cat", groups=groups)
