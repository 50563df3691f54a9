"""The knowledge distribution: as the naive loop, interrupted and resumed, as a value; a group that holds nothing."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from evaluation_helpers import TEXT, byte_tokenizer, llama, sums_alone
from families import FAMILIES, Unrounded, plan_keeping, random_units

import prunekit.knowledge.measurement as knowledge
from prunekit import PrunekitError, Taylor, discover, load, prune, zero_shot
from prunekit.evaluation.likelihood import Span
from prunekit.evaluation.multiple_choice import judge, question_spans
from prunekit.importance.ablation import ablated
from prunekit.knowledge import KnowledgeDistribution, knowledge_distribution, knowledge_of_units
from prunekit.knowledge.question_spans import Runner
from prunekit.questions import Question, Task
from prunekit.world import tasks

KINDS = ("kv_head", "query_head", "ffn_channel", "block", "layer")


@pytest.fixture(scope="module")
def world():
    model, tokenizer = load("world")
    return model, tokenizer, discover(model)


def few(n=4):
    """Every so many of the world's questions, of each task."""
    return [replace(task, questions=task.questions[:: len(task.questions) // n + 1]) for task in tasks().values()]


def random_scores(groups, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.n_units, generator=draw) for group in groups}


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def counted(monkeypatch, stop_after=None):
    """How often something was ablated; Ctrl-C after so many times."""
    times = []

    def counting(*args):
        times.append(args[1].name)
        if stop_after is not None and len(times) > stop_after:
            raise KeyboardInterrupt
        return ablated(*args)

    monkeypatch.setattr(knowledge, "ablated", counting)
    return times


def same(a, b):
    pd.testing.assert_frame_equal(a.ablations, b.ablations)
    pd.testing.assert_frame_equal(a.questions, b.questions)
    return all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("hit", "loss", "dense_hit", "dense_loss")
    )


@pytest.mark.slow
def test_it_is_what_the_naive_loop_measures(world):
    model, tokenizer, groups = world
    chosen, asked, before = [g for g in groups.of_kind(*KINDS) if g.layer in (0, 5)], few(2), weights(model)
    scores = random_scores(chosen)
    found = knowledge_distribution(model, tokenizer, chosen, scores, ratios=(0.5, 1.0), tasks=asked)
    assert found.packed and found.resumed and unchanged(model, before)
    questions = [(task, i, q) for task in asked for i, q in enumerate(task.questions)]
    spans = [span for _, _, q in questions for span in question_spans(tokenizer, q, 256, "")]
    dense = sums_alone(model, spans)
    for row, told in list(found.ablations.iterrows())[::4] + [(None, None)]:
        if row is None:
            sums, hit, loss = dense, found.dense_hit, found.dense_loss
        else:
            group = groups[told["group"]]
            n = round(told["ratio"] * group.n_units)
            assert told["n_ablated"] == n == len(told["units"])
            assert told["units"] == sorted(scores[group.name].argsort()[:n].tolist())
            with ablated(model, group, told["units"]):
                sums, hit, loss = sums_alone(model, spans), found.hit[row], found.loss[row]
            assert row == 0 or not torch.equal(sums, dense)
        scores_of = sums.split([len(q.choices) for _, _, q in questions])
        rows = [judge(*asked_one, mine) for asked_one, mine in zip(questions, scores_of, strict=True)]
        certain = np.array([abs(row["margin"]) > 1e-4 for row in rows])
        assert np.array_equal(hit[certain], np.array([row["hit"] for row in rows])[certain]) and certain.mean() > 0.9
        expected = [-s.log_softmax(0)[q.answer].item() for s, (_, _, q) in zip(scores_of, questions, strict=True)]
        np.testing.assert_allclose(loss, expected, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama_tied", "gemma3", "opt_projected", "mixtral", "falcon_alibi", "gpt_neox"])
def test_ablated_sums_are_those_of_the_whole_model(name):
    """Every kind of group, hidden channels and vocabulary too."""
    check_every_group(FAMILIES[name].model(), FAMILIES[name].groups())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_models_that_were_cut_unevenly_too(name):
    family = FAMILIES[name]
    model, groups = family.model(), family.groups()
    small = prune(model, replace(plan_keeping(groups, random_units(family, groups, seed=3)), groups=groups))
    check_every_group(small, discover(small))


def check_every_group(model, groups):
    draw = torch.Generator().manual_seed(1)
    spans = [Span(tuple(torch.randint(0, 48, (9,), generator=draw).tolist()), 3) for _ in range(4)]
    spans += [Span((*span.tokens[:5], 7, 8), 4) for span in spans]
    with Unrounded(), torch.no_grad():
        runner = Runner(model, spans, 64)
        assert runner.resumed
        firsts = set()
        for number, group in enumerate(sorted(groups, key=runner.layers_of)):
            layers = runner.layers_of(group)
            firsts |= {layers[:1]}
            units = range(group.n_units if number % 2 else (group.n_units + 1) // 2)  # the whole group, or a part of it
            with ablated(model, group, units):
                expected = sums_alone(model, spans)
                torch.testing.assert_close(runner.sums(layers), expected, rtol=1e-9, atol=1e-9)
    assert firsts >= {(), (0,), (1,)}


@pytest.mark.slow
def test_models_whose_layers_are_no_chain_run_from_the_start(world, monkeypatch):
    model, tokenizer, groups = world
    chosen = groups.of_kind("kv_head")[3:5]
    usual = knowledge_distribution(model, tokenizer, chosen, random_scores(chosen), tasks=few(2))
    monkeypatch.setattr("prunekit.knowledge.question_spans.Layerwise.of", lambda *_: None)
    found = knowledge_distribution(model, tokenizer, chosen, random_scores(chosen), tasks=few(2))
    assert not found.resumed and usual.resumed and "run through all layers" in repr(found)
    np.testing.assert_allclose(found.loss, usual.loss, atol=2e-4)


def test_what_answers_alike_is_run_once(world, monkeypatch):
    """All heads ablated, all queries, and the attention block: one and the same."""
    model, tokenizer, groups = world
    chosen = [g for g in groups.of_kind("kv_head", "query_head", "block") if g.layer == 4 and "mlp" not in g.name]
    ran = []
    logits = Runner.sums.__globals__["Layerwise"].logits
    seam = "prunekit.knowledge.question_spans.Layerwise.logits"
    monkeypatch.setattr(seam, lambda *args: (ran.append(1), logits(*args))[1])
    found = knowledge_distribution(model, tokenizer, chosen, random_scores(chosen), ratios=(1.0,), tasks=few(1))
    assert len(found.loss) == 3 and np.array_equal(found.loss[0], found.loss[2])
    assert len(ran) == 8 + 2 * found_batches(model, found, tokenizer)  # the trial's, the dense model's, and one more


def found_batches(model, found, tokenizer):
    spans = [s for task in few(1) for q in task.questions for s in question_spans(tokenizer, q, 256, "")]
    with torch.no_grad():
        return len(Runner(model, spans, knowledge.POSITIONS)._batches)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_the_weights_are_whole(world, tmp_path, monkeypatch):
    model, tokenizer, groups = world
    chosen, before, path = groups.of_kind("kv_head")[2:5], weights(model), tmp_path / "k.safetensors"
    scores = random_scores(chosen)

    def run(**options):
        return knowledge_distribution(model, tokenizer, chosen, scores, ratios=(0.5, 0.6, 1), tasks=few(2), **options)

    whole = run()
    times = counted(monkeypatch, stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        run(path=path)
    assert unchanged(model, before) and not model.training and len(times) == 4
    part = KnowledgeDistribution.load(path)
    assert len(part.ablations) == 5 and part.unfinished == 4 and "4 more to measure" in repr(part)
    times = counted(monkeypatch)
    again = run(path=path)
    assert times == [chosen[1].name] + 2 * [chosen[2].name]  # .5 and .6 of 4 units are the same 2: 5 rows of 3
    assert same(again, whole) and again.unfinished == 0
    assert same(KnowledgeDistribution.load(path), whole)
    times = counted(monkeypatch)
    assert same(run(path=path), whole) and times == []
    assert [file.name for file in tmp_path.iterdir()] == ["k.safetensors"]


def test_ctrl_c_inside_the_model_leaves_weights_and_layers(world, monkeypatch):
    model, tokenizer, groups = world
    before, calls, forward = weights(model), [], type(model).forward

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 16:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        knowledge_of_units(model, tokenizer, groups.of_kind("kv_head")[3:4], tasks=few(2))
    assert unchanged(model, before)
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


def test_a_file_of_another_run_is_refused(world, tmp_path):
    model, tokenizer, groups = world
    chosen, path = groups.of_kind("kv_head")[7:], tmp_path / "k.safetensors"
    knowledge_of_units(model, tokenizer, chosen, tasks=few(1), path=path)
    kept = path.read_bytes()
    other = load("world")[0]
    with torch.no_grad():
        other.model.layers[3].mlp.up_proj.weight[0, 0] += 1e-3
    scores = random_scores(chosen)
    for attempt in (
        lambda: knowledge_of_units(other, tokenizer, chosen, tasks=few(1), path=path),
        lambda: knowledge_of_units(model, tokenizer, chosen, tasks=few(2), path=path),
        lambda: knowledge_of_units(model, tokenizer, groups.of_kind("kv_head")[6:], tasks=few(1), path=path),
        lambda: knowledge_distribution(model, tokenizer, chosen, scores, tasks=few(1), path=path),
    ):
        with pytest.raises(PrunekitError, match="another run.*give another path, or delete the file"):
            attempt()
    assert path.read_bytes() == kept


@pytest.mark.slow
def test_units_and_the_facts_that_die_with_them(world):
    model, tokenizer, groups = world
    group, asked = groups["model.layers.6.self_attn:kv_head"], few(15)
    found = knowledge_of_units(model, tokenizer, [group], tasks=asked)
    assert found.table()["unit"].unique().tolist() == [0, 1, 2, 3]
    dense = zero_shot(model, tokenizer, asked).questions
    most = 0
    for unit in range(4):
        with ablated(model, group, [unit]):
            result = zero_shot(model, tokenizer, asked)
        gone = dense.index[dense["hit"] & ~result.questions["hit"]]
        died = found.died(group.name, unit=unit)
        most = max(most, len(gone))
        assert died.index.tolist() == gone.tolist()
        assert (died["task"] == dense.loc[gone, "task"]).all() and (died["loss"] > died["dense"]).mean() > 0.9
    assert most > 10
    table = found.table("task").query("unit == 3").set_index("task")
    np.testing.assert_allclose(table["value"], result.accuracy()[table.index])
    np.testing.assert_allclose(table["change"], table["value"] - table["dense"])


def test_the_world_brings_its_own_questions(world, monkeypatch):
    model, tokenizer, groups = world
    monkeypatch.setattr("prunekit.world.tasks", lambda: {task.name: task for task in few(1)})
    found = knowledge_of_units(model, tokenizer, groups.of_kind("layer")[7:])
    assert found.questions["task"].unique().tolist() == [*tasks()] and found.ablations["unit"].tolist() == [0]


def test_texts_are_measured_as_perplexity_measures_them():
    from prunekit.evaluation import measure_perplexity

    model, tokenizer = llama(), byte_tokenizer()
    groups = discover(model).of_kind("kv_head")
    texts = {"cats": TEXT, "dogs": "a dog barks at a log in the fog. " * 9}
    found = knowledge_of_units(model, tokenizer, groups, text=texts)
    table = found.table("domain", "loss")
    with ablated(model, groups[1], [0]):
        for name, text in texts.items():
            result = measure_perplexity(model, tokenizer, text)
            row = table[(table["domain"] == name) & (table["layer"] == 1) & (table["unit"] == 0)].iloc[0]
            assert row["value"] == pytest.approx(math.log(result.value), rel=1e-6) and row["n"] == result.n_windows
    assert found.questions["right"].str.contains("dog barks").any() and not found.hit.any()
    assert set(found.table()["measure"]) == {"loss"}  # all that there is
    with pytest.raises(PrunekitError, match="only text was evaluated.*measure='loss'"):
        found.table(measure="accuracy")
    assert knowledge_of_units(model, tokenizer, groups, text=TEXT).questions["domain"].unique().tolist() == ["text"]


@pytest.mark.slow
def test_a_group_with_nothing_in_it_is_damaged_least(world):
    """Whatever the scores: an FFN of random weights whose result is scaled to nothing."""
    model, tokenizer = load("world")
    with torch.no_grad():
        for linear in (model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj):
            linear.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
        model.model.layers[0].mlp.down_proj.weight.normal_().mul_(1e-8)
    groups = discover(model).of_kind("ffn_channel", "kv_head")[:6]
    empty = "model.layers.0.mlp:ffn_channel"
    for seed in range(2):
        scores = random_scores(groups, seed)
        scores[empty] = scores[empty] * 1e6
        found = knowledge_distribution(model, tokenizer, groups, scores, ratios=(0.25, 0.5), text=[TEXT_OF_WORLD])
        damage = found.damage().set_index("group")["damage"]
        assert damage.abs().idxmin() == empty and damage[empty] < 1e-4 < damage.drop(empty).abs().min()
        assert empty not in found.unprunable(gamma=0.5)


TEXT_OF_WORLD = "\n\n".join(q.context + q.choices[q.answer] for q in tasks()["arc_easy"].questions[:30])


def by_hand(loss, **columns):
    """Three groups of 4 units at 2 ratios, 2 questions in domain a and 1 in b; the dense loss is 1 everywhere."""
    names = ("layers.0:kv_head", "layers.1:kv_head", "layers.1:ffn_channel")
    ablations = pd.DataFrame(
        [
            {"group": name, "kind": name.split(":")[1], "layer": int(name[7]), "ratio": ratio, "n_ablated": n,
             "units": [*range(n)]}
            for name in names for ratio, n in ((0.25, 1), (0.5, 2))
        ]
    )  # fmt: skip
    questions = pd.DataFrame(
        {"task": ["t", "t", "u"], "domain": ["a", "a", "b"], "tier": [None, "rare", "rare"], "hops": [1.0, 2.0, None],
         "context": "c", "right": "r", "n_tokens": 1, "chance": 0.5}
    )  # fmt: skip
    loss = np.array(loss, dtype=float)
    hit = loss < 2
    return KnowledgeDistribution(
        ablations, questions, hit, loss, np.ones(3, dtype=bool), np.ones(3), True, True, **columns
    )


RISING = [[1, 1, 1], [1, 3, 1], [1, 1, 3], [1, 3, 3], [1, 1, 5], [9, 9, 9]]


def test_damage_by_hand():
    found = by_hand(RISING)
    damage = found.damage()["damage"].tolist()
    assert damage == pytest.approx([(0 + 0 + 1 + 0) / 4, (0 + 2 + 1 + 2) / 4, (0 + 4 + 8 + 8) / 4])
    assert found.damage(ratios=(0.25,))["damage"].tolist() == [0, 1, 2]
    falls = found.damage("accuracy", ratios=(0.5,))["damage"].tolist()
    assert falls == pytest.approx([0.25, 0.75, 1.0])  # in a a half, none in b; …
    assert found.unprunable() == ["layers.1:ffn_channel"] and found.unprunable(gamma=0) == []
    assert found.unprunable(gamma=0.34) == ["layers.1:ffn_channel", "layers.1:kv_head"]
    assert len(found.unprunable(gamma=1)) == 3
    assert found.died("layers.1:kv_head", ratio=0.5).index.tolist() == [1, 2]


def test_tables_by_hand():
    found = by_hand(RISING)
    table = found.table("tier", "loss")
    assert table["tier"].unique().tolist() == ["rare"] and table["n"].unique().tolist() == [2]
    assert table["change"].tolist() == [0, 1, 1, 2, 2, 8]
    assert found.table("hops")["hops"].tolist()[:2] == [1.0, 2.0]
    assert found.table()["value"].tolist()[2:4] == [0.5, 1.0]
    assert "<table" in found._repr_html_() and "6 ablations of 3 groups; 3 questions" in repr(found)


def test_a_text_window_weighs_as_many_tokens_as_it_has():
    found = by_hand(RISING)
    questions = found.questions.assign(domain="t", n_tokens=[1, 2, 1], chance=float("nan"))
    value = replace(found, questions=questions).table("domain", "loss")["value"]
    assert value.tolist() == pytest.approx([1, 2, 1.5, 2.5, 2, 9])


def test_agreement_is_whole_with_the_truth_and_reversed_with_its_negative():
    loss = [[1, 1, 1], [2, 2, 2], [3, 3, 3], [5, 5, 5], [7, 7, 7], [9, 9, 9]]
    found = by_hand(loss)
    truth = {}
    for row, name in enumerate(found.ablations["group"].unique()):
        one, two = loss[2 * row][0] - 1, loss[2 * row + 1][0] - 1
        truth[name] = torch.tensor([one, two - one, 0.0, 0.0])
    negative = {name: -values for name, values in truth.items()}
    table = found.agreement({"truth": truth, "negative": negative})
    assert table["kind"].unique().tolist() == ["kv_head", "ffn_channel", "all"]
    assert table.query("score == 'truth'")["spearman"].tolist() == pytest.approx([1.0] * 6)
    assert table.query("score == 'negative'")["spearman"].tolist() == pytest.approx([-1.0] * 6)
    assert table.query("kind == 'all'")["n"].tolist() == [6] * 4
    constant = {name: torch.zeros(4) for name in truth}
    assert found.agreement({"none": constant})["spearman"].isna().all()
    assert found.agreement({"truth": truth}, ratio=0.5).query("kind == 'all'")["n"].tolist() == [3, 3]
    shuffled = {"layers.0:kv_head": torch.tensor([9.0, 0, 0, 0])}
    assert found.agreement({"some": shuffled})["n"].unique().tolist() == [2]  # of that group alone


@pytest.mark.slow
@pytest.mark.parametrize("single", [False, True])
def test_a_saved_one_is_the_same_when_loaded(world, tmp_path, single):
    model, tokenizer, groups = world
    chosen, text = (
        [*groups.of_kind("kv_head", "layer")[:2], groups["vocabulary"]][: 1 if single else 3],
        [TEXT_OF_WORLD],
    )
    if single:
        found = knowledge_of_units(model, tokenizer, chosen, tasks=few(1), text={"prose": text})
    else:
        found = knowledge_distribution(model, tokenizer, chosen, random_scores(chosen), tasks=few(1), text=text)
    loaded = KnowledgeDistribution.load(found.save(tmp_path / "k.safetensors"))
    assert same(loaded, found) and repr(loaded) == repr(found)
    pd.testing.assert_frame_equal(loaded.table("hops", "loss"), found.table("hops", "loss"))
    with pytest.raises(PrunekitError, match="cannot write .*No such file"):
        found.save(tmp_path / "no" / "k.safetensors")
    (tmp_path / "x").write_text("no")
    for wrong, told in {"x": "no knowledge distribution in", "none": "cannot read .*none.*No such file"}.items():
        with pytest.raises(PrunekitError, match=told):
            KnowledgeDistribution.load(tmp_path / wrong)


def test_an_ablation_that_breaks_the_model_is_infinite_and_the_run_goes_on():
    model, tokenizer = llama(rms_norm_eps=0.0), byte_tokenizer()
    groups = discover(model)
    chosen = [groups.of_kind("hidden")[0], groups.of_kind("kv_head")[0]]
    task = Task("t", "f", (Question("a cat", (" sat", " ran far"), 0, "d"),))
    found = knowledge_distribution(
        model, tokenizer, chosen, random_scores(chosen), ratios=(1.0,), tasks=[task], text=TEXT
    )
    assert np.isinf(found.loss[0]).all() and not found.hit[0].any() and np.isfinite(found.loss[1]).all()
    assert found.unprunable(gamma=0.1, ratios=(1.0,)) == [chosen[0].name]


def test_at_least_one_unit_goes_and_whole_groups_once(world):
    model, tokenizer, groups = world
    chosen = [groups.of_kind("kv_head")[7], groups.of_kind("layer")[7]]
    scores = {chosen[0].name: torch.tensor([2.0, 1.0, 1.0, 3.0])}
    found = knowledge_distribution(model, tokenizer, chosen, scores, ratios=(0.01, 0.5), tasks=few(1))
    assert found.ablations["units"].tolist() == [[1], [1, 2], [0]]  # the first of equals first
    assert found.ablations["ratio"].tolist() == [0.01, 0.5, 1.0]
    assert found.damage(ratios=(0.5,))["kind"].tolist() == ["kv_head"]


def test_what_is_refused(world, tmp_path):
    model, tokenizer, groups = world
    chosen = groups.of_kind("kv_head")[:1]
    name, scores, asked = chosen[0].name, random_scores(chosen), few(1)
    other = llama()

    def run(groups=chosen, scores=scores, model=model, tokenizer=tokenizer, **options):
        return knowledge_distribution(model, tokenizer, groups, scores, **({"tasks": asked} | options))

    for message, attempt in {
        "there are no groups to ablate": lambda: run([]),
        r"groups\[0\]='model.layers.0' is not allowed; give an": lambda: run(["model.layers.0"]),
        "is not of this model.*discover": lambda: run(model=other),
        r"ratios=\(0, 0.5\); give fractions": lambda: run(ratios=(0, 0.5)),
        r"ratios=\(1.5,\)": lambda: run(ratios=(1.5,)),
        r"ratios=\(\)": lambda: run(ratios=()),
        "ratios=1.0 is not allowed; give a list": lambda: run(ratios=1.0),
        "tokenizer=None; give": lambda: run(tokenizer=None),
        "scores=Taylor.* is not allowed; give a dictionary": lambda: run(scores=Taylor()),
        "no task 'arc_simple'": lambda: run(tasks=["arc_simple"]),
        "scores have no entry for": lambda: run(scores={}),
        r"must be 4 finite numbers; got shape \(3,\)": lambda: run(scores={name: torch.ones(3)}),
        "1 of them not finite": lambda: run(scores={name: torch.tensor([1.0, 2, 3, math.nan])}),
        "no tasks or text given": lambda: run(tasks=None, tokenizer=byte_tokenizer()),
        "no tasks or text given: give tasks=": lambda: run(tasks=None, text={}),
        "no question to ask": lambda: run(tasks=[]),
        "names both questions and a text": lambda: run(text={"fact": TEXT * 3}),
        "less than one window": lambda: run(text="short"),
        "tokens_a_batch=0": lambda: run(tokens_a_batch=0),
        "give a .safetensors file in an existing folder": lambda: run(path=tmp_path / "k.json"),
        "in an existing folder": lambda: run(path=tmp_path / "no" / "k.safetensors"),
    }.items():
        with pytest.raises(PrunekitError, match=message):
            attempt()
    broken = load("world")[0]
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(PrunekitError, match=r"layers\.1\.mlp\.up_proj\.weight has NaN"):
        run(model=broken)
    found = by_hand(RISING)
    single = replace(found, ablations=found.ablations.assign(unit=[0, 1] * 3))
    for message, attempt in {
        "by='colour' is unknown; allowed: 'domain'": lambda: found.table("colour"),
        "measure='speed'": lambda: found.damage("speed"),
        "were not all measured; give some of 0.25, 0.5": lambda: found.damage(ratios=(0.75,)),
        "gamma=2": lambda: found.unprunable(gamma=2),
        "single units were ablated here": lambda: single.damage(),
        "no group 'x' was ablated": lambda: found.died("x", ratio=0.5),
        "ratio=0.7 of 'layers.0:kv_head' was not measured; there is 0.25, 0.5": lambda: found.died(
            "layers.0:kv_head", ratio=0.7
        ),
        "ratio=None of": lambda: found.died("layers.0:kv_head"),
        "unit=1 of 'layers.0:kv_head' was not measured.*give ratio": lambda: found.died("layers.0:kv_head", unit=1),
        "give unit=, one of": lambda: single.died("layers.0:kv_head", ratio=0.5),
        "unit=7": lambda: single.died("layers.0:kv_head", unit=7),
        "to compare with 0 scores": lambda: found.agreement({}),
        "ratio=0.7": lambda: found.agreement({"a": {}}, ratio=0.7),
        "'a' scores none of these groups": lambda: found.agreement({"a": {}}),
        "has 1 scores of": lambda: found.agreement({"a": {"layers.0:kv_head": torch.ones(1)}}),
    }.items():
        with pytest.raises(PrunekitError, match=message):
            attempt()
