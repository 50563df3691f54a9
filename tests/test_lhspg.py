"""LHSPG: units that reach zero by the projection, and what that does and does not change."""

import copy
import math

import pytest
import torch
from families import FAMILIES, LINEAR, logits, wrapped
from hypothesis import given
from hypothesis import strategies as st
from test_importance import tiny_llama
from torch import nn

from prunekit import Taylor, discover, prune
from prunekit.errors import PrunekitError
from prunekit.recovery.lhspg import LHSPG, importance_saliency, update_saliency
from prunekit.recovery.lora import LoRA, LoraPair, attach, detach, lora_pairs
from prunekit.recovery.lora_units import GroupUnits, UpdateStatistics, _Owned, lora_saliency, units_of

KINDS = ("kv_head", "ffn_channel")
WANTED = {"kv_head": 1, "ffn_channel": 7}
TOKENS = (torch.arange(8)[:, None] * 7 + torch.arange(12)) % 48


def adapted(model=None, **options):
    """A model with LoRA whose B is not zero, so that every update counts from the start."""
    model = attach(model or tiny_llama(), LoRA(**{"r": 3, "dropout": 0.0, **options}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(torch.randn_like(p) * 0.05)
    return model


def shearing(model, wanted=None, **options):
    options = {"warmup_steps": 2, "period_steps": 3, "n_periods": 2, "lr": 1e-2, **options}
    return LHSPG(model, discover(model).of_kind(*KINDS), wanted or WANTED, **options)


def train(model, optimizer, n_steps, tokens=TOKENS):
    for _ in range(n_steps):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()


# The dependency graph over LoRA modules

L = "base_model.model.model.layers.0."


def test_the_units_of_one_llama_layer_are_those_of_the_paper():
    """Rows of W go with rows of B, columns of W with columns of A (Alg. 2); written down by hand."""
    found = discover(adapted())
    heads = {("q_proj", 0, 8), ("k_proj", 0, 4), ("v_proj", 0, 4), ("o_proj", 1, 8)}
    expected = {}
    for module, dim, width in heads:
        expected[f"{L}self_attn.{module}.base_layer.weight", dim] = width
        pair = "lora_A" if dim == 1 else "lora_B"
        expected[f"{L}self_attn.{module}.{pair}.default.weight", dim] = width
    group = found[f"{L}self_attn:kv_head"]
    assert {(m.parameter, m.dim): m.width for m in group.members} == expected
    for member in group.members:  # unit u owns the u-th stretch
        assert member.index.tolist() == torch.arange(2 * member.width).view(2, -1).tolist()
    channels = {("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)}
    expected = {(f"{L}mlp.{module}.base_layer.weight", dim) for module, dim in channels}
    expected |= {(f"{L}mlp.{module}.{'lora_A' if dim else 'lora_B'}.default.weight", dim) for module, dim in channels}
    group = found[f"{L}mlp:ffn_channel"]
    assert {(m.parameter, m.dim) for m in group.members} == expected
    assert all(member.index.tolist() == [[u] for u in range(12)] for member in group.members)
    ranks = {(m.parameter, m.dim) for g in found.of_kind("rank") for m in g.members}
    assert len(ranks) == 2 * 2 * 7  # both sides of the pair of each projection, and nothing else
    assert all((".lora_A." in name, dim) in ((True, 0), (False, 1)) for name, dim in ranks)


def test_ranks_are_not_pruned():
    model = adapted()
    with pytest.raises(PrunekitError, match="rank of LoRA"):
        units_of(model, discover(model).of_kind("rank"))


# One unit, one step


def one_unit(x, u):
    """A unit that owns one row of a weight, whose update is u."""
    weight = nn.Parameter(torch.tensor([x], dtype=torch.float64), requires_grad=False)
    a = nn.Parameter(torch.tensor([u], dtype=torch.float64))
    b = nn.Parameter(torch.ones(1, 1, dtype=torch.float64))
    pair, index = LoraPair(weight, a, b, 1.0, False), torch.zeros(1, 1, dtype=torch.long)
    return GroupUnits("g", "ffn_channel", 1, (_Owned(weight, 0, index, pair),), (_Owned(b, 0, index),))


numbers = st.floats(-3, 3, allow_nan=False).map(lambda x: round(x, 3))
vectors = st.integers(1, 4).flatmap(lambda n: st.tuples(*[st.lists(numbers, min_size=n, max_size=n)] * 2))


@given(vectors, st.integers(1, 9), st.sampled_from([0.0, 0.1, 0.5]))
def test_a_step_is_the_papers(pair, remaining, epsilon):
    """Alg. 4, spelled out: x̃ = [x + γBA] − λ·x/‖x‖, and the half-space."""
    x, u = (torch.tensor(v, dtype=torch.float64) for v in pair)
    norm = x.norm()
    if norm < 1e-3:
        return
    length = (x + u) @ x / (norm * remaining)
    trial = x + u - length * x / norm
    margin = trial @ x - epsilon * norm**2
    if abs(margin) < 1e-9 and remaining > 1:
        return  # on the edge, rounding decides
    unit = one_unit(*pair)
    after = unit.shrink(torch.tensor([0]), remaining, epsilon)
    falls = margin <= 0 or remaining == 1
    expected = torch.zeros_like(x) if falls else trial
    torch.testing.assert_close(unit.weights[0].tensor[0].detach(), expected, rtol=1e-9, atol=1e-12)
    assert float(after) == pytest.approx(float(expected.norm()), abs=1e-12)
    assert not bool(unit.lora[0].tensor.any())


@given(vectors)
def test_the_last_step_is_always_behind_the_half_space(pair):
    unit = one_unit(*pair)
    assert unit.shrink(torch.tensor([0]), 1, 0.0).item() == 0.0
    assert not bool(unit.weights[0].tensor.any())


def test_without_an_update_units_shrink_in_equal_parts():
    """λ = ‖x‖ / remaining, as in the released code."""
    unit, norms = one_unit([3.0, 4.0], [0.0, 0.0]), []
    for remaining in (5, 4, 3, 2, 1):
        norms.append(unit.shrink(torch.tensor([0]), remaining, 0.0).item())
    assert norms == pytest.approx([4.0, 3.0, 2.0, 1.0, 0.0])


# The whole run


def test_exactly_as_many_units_as_asked_are_exactly_zero():
    model = adapted()
    optimizer = shearing(model)
    train(model, optimizer, optimizer.pruning_steps)
    parameters = dict(model.named_parameters())
    zero = dict.fromkeys(KINDS, 0)
    for group in discover(model).of_kind(*KINDS):
        for unit in range(group.n_units):
            values = [parameters[m.parameter].index_select(m.dim, m.index[unit]) for m in group.members]
            if not any(bool(value.any()) for value in values):
                zero[group.kind] += 1
                assert unit in optimizer.redundant[group.name]
    assert zero == WANTED
    assert sum(map(len, optimizer.redundant.values())) == sum(WANTED.values())


def test_units_are_far_from_zero_one_step_before_the_end():
    """No final top-k: what stands one step before is what the shrinking left, a third of the start here."""
    model = adapted()
    optimizer = shearing(model, lr=1e-3)
    train(model, optimizer, optimizer.pruning_steps)
    norms = optimizer.history().pivot_table(index=["period", "group", "unit"], columns="step", values="norm")
    for period, table in norms.groupby("period"):
        table = table.dropna(axis=1)
        assert list(table.columns) == [2 + 3 * (period - 1) + i for i in range(4)]
        assert bool((table.iloc[:, -1] == 0).all())
        share = table.iloc[:, -2] / table.iloc[:, 0]
        assert bool(share.between(0.2, 0.5).all())


def test_the_units_of_a_period_are_the_least_salient():
    model = adapted()
    seen = []
    optimizer = shearing(model, saliency=lambda o: seen.append(update_saliency(o)) or seen[-1])
    train(model, optimizer, 2)
    scores = torch.cat([v for name, v in seen[0].items() if "ffn" in name])
    taken = [float(seen[0][name][u]) for name, units in optimizer.redundant.items() if "ffn" in name for u in units]
    assert len(taken) == round(7 / 2)
    assert max(taken) <= float(scores.sort().values[len(taken) - 1])


def test_a_merge_changes_no_output_and_takes_the_update_into_the_weights():
    model = adapted()
    weight = dict(model.named_parameters())[f"{L}mlp.up_proj.base_layer.weight"]
    before, outputs = weight.clone(), model(input_ids=TOKENS).logits
    for pair in lora_pairs(model).values():
        pair.merge()
    torch.testing.assert_close(model(input_ids=TOKENS).logits, outputs, rtol=1e-4, atol=1e-5)
    assert not torch.equal(weight, before)
    assert not any(bool(p.any()) for n, p in model.named_parameters() if "lora_B" in n)


def test_a_period_ends_with_a_merge():
    model = adapted()
    optimizer = shearing(model, wanted={"ffn_channel": 0})  # a period may take nothing
    lora = [p for n, p in model.named_parameters() if "lora_B" in n]
    for n_steps in (2, 3, 3):  # the warm-up, and both periods
        assert all(bool(p.any()) for p in lora) or n_steps == 3
        train(model, optimizer, n_steps)
        assert any(bool(p.any()) for p in lora) == (n_steps == 2)
    assert optimizer.finished and optimizer.history().empty


def test_few_units_in_many_periods():
    model = adapted()
    optimizer = shearing(model, wanted={"kv_head": 1}, n_periods=5, period_steps=2)
    train(model, optimizer, optimizer.pruning_steps)
    assert optimizer.finished and sum(map(len, optimizer.redundant.values())) == 1


PEFT = [
    wrapped(FAMILIES["llama_gqa"], LINEAR),
    wrapped(FAMILIES["llama_biased"], LINEAR),
    wrapped(FAMILIES["gpt2"], ["c_attn", "c_proj", "c_fc"]),
    wrapped(FAMILIES["opt"], ["q_proj", "v_proj", "fc1", "fc2"]),
    wrapped(FAMILIES["phi3"], ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
]


@pytest.mark.parametrize("family", PEFT, ids=[family.name + str(i) for i, family in enumerate(PEFT)])
def test_the_zeroed_model_is_the_cut_model(family):
    """Construction: fused, transposed, biased projections too."""
    model = family.model()
    optimizer = LHSPG(
        model, discover(model).of_kind(*KINDS), {"kv_head": 3, "ffn_channel": 31},
        warmup_steps=1, period_steps=2, n_periods=2, lr=1e-3,
    )  # fmt: skip
    train(model, optimizer, optimizer.pruning_steps + 1)
    zeroed = detach(model, merge=True)
    small = prune(zeroed, optimizer.plan(discover(zeroed)))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in zeroed.parameters())
    torch.testing.assert_close(logits(small), logits(zeroed), rtol=0, atol=1e-11)


def test_zeros_hold_in_the_steps_after():
    """AdamW's momentum would move A and B of units that are gone."""
    model = adapted()
    optimizer = shearing(model)
    train(model, optimizer, optimizer.pruning_steps)
    b = dict(model.named_parameters())[f"{L}mlp.up_proj.lora_B.default.weight"]
    before = b.clone()
    train(model, optimizer, 3)
    assert not torch.equal(b, before)  # training goes on
    for group in optimizer.units:
        gone = torch.tensor(optimizer.redundant[group.name], dtype=torch.long)
        assert not any(bool(owned.rows(gone).any()) for owned in (*group.weights, *group.lora))


def test_units_can_be_chosen_without_a_warm_up():
    model = adapted()
    optimizer = shearing(model, warmup_steps=0)
    train(model, optimizer, optimizer.pruning_steps)
    assert sum(map(len, optimizer.redundant.values())) == 8


def test_any_importance_may_say_which_units_go():
    model = adapted()
    optimizer = shearing(model, saliency=importance_saliency(Taylor(), TOKENS))
    train(model, optimizer, optimizer.pruning_steps)
    assert sum(map(len, optimizer.redundant.values())) == 8
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


@pytest.mark.parametrize("n_before", [1, 4, 7])  # in the warm-up, in the middle of a period, in the last one
def test_a_state_taken_in_the_middle_goes_on_as_if_nothing_had_been(n_before):
    whole, first, second = (adapted() for _ in range(3))
    straight, until, after = shearing(whole), shearing(first), shearing(second)
    train(whole, straight, 9)
    train(first, until, n_before)
    second.load_state_dict({n: p for n, p in first.state_dict().items() if "lora_" in n}, strict=False)
    after.load_state_dict(copy.deepcopy(until.state_dict()))
    train(second, after, 9 - n_before)
    assert after.redundant == straight.redundant
    for (name, a), b in zip(whole.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert after.history().equals(straight.history())


def test_it_works_under_accelerate():
    from accelerate import Accelerator

    plain, wrapped_ = adapted(), adapted()
    straight, other = shearing(plain), shearing(wrapped_)
    train(plain, straight, 8)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(wrapped_, other)
    for _ in range(8):
        optimizer.zero_grad()
        accelerator.backward(model(input_ids=TOKENS, labels=TOKENS).loss)
        optimizer.step()
    for a, b in zip(plain.parameters(), wrapped_.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_closure_is_called_once_a_step():
    model = adapted()
    optimizer, losses = shearing(model), []

    def closure():
        optimizer.zero_grad()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(3):
        assert optimizer.step(closure).item() == losses[-1]
    assert len(losses) == 3
    assert losses[2] < losses[0]


# Saliency


def _statistics(x, u):
    x, u = (torch.tensor(v, dtype=torch.float64) for v in (x, u))
    return UpdateStatistics(x.norm(dim=1), u.norm(dim=1), (x * u).sum(1))


def test_saliency_by_hand():
    x = {"a": [[3.0, 4.0], [1.0, 0.0]], "b": [[0.0, 2.0]]}
    u = {"a": [[0.0, 1.0], [-2.0, 0.0]], "b": [[2.0, 0.0]]}
    norm, update, dot = [5.0, 1.0, 2.0], [1.0, 2.0, 2.0], [4.0, -2.0, 0.0]
    cosine = [4 / 5, -1.0, 0.0]
    five = [norm, [5.0, 0.5, 1.0], [1 + c for c in cosine], [abs(d) for d in dot], [d * d / 2 for d in dot]]
    expected = [sum(p[i] / math.sqrt(sum(v * v for v in p)) for p in five) / 5 for i in range(3)]
    found = lora_saliency({name: _statistics(x[name], u[name]) for name in x})
    assert torch.cat([found["a"], found["b"]]).tolist() == pytest.approx(expected)
    assert dot == [float(d) for name in x for d in _statistics(x[name], u[name]).dot]
    assert update == [float(d) for name in x for d in _statistics(x[name], u[name]).update]


def test_units_that_training_does_not_move_are_finite():
    found = lora_saliency({"a": _statistics([[1.0], [2.0], [0.0]], [[0.0], [0.5], [0.0]])})
    assert bool(found["a"].isfinite().all())
    assert found["a"].argmax() == 1
    still = lora_saliency({"a": _statistics([[1.0], [2.0]], [[0.0], [0.0]])})
    assert still["a"].argsort().tolist() == [0, 1]


# Refusals


@pytest.fixture(scope="module")
def ready():
    """A model and its groups, which no refusal changes."""
    model = adapted()
    return model, discover(model).of_kind(*KINDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"period_steps": 0}, "period_steps=0"),
        ({"period_steps": 1.5}, "period_steps=1.5"),
        ({"n_periods": 0}, "n_periods=0"),
        ({"epsilon": 1.0}, "epsilon=1.0"),
        ({"epsilon": "x"}, "epsilon='x'"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"betas": (2.0, 0.9)}, r"betas\[0\]=2.0"),
        ({"saliency": None}, "saliency=None"),
        ({"wanted": 5}, "n_units=5"),
        ({"min_units": 0}, "min_units=0"),
        ({"wanted": {"ffn_channel": 23}}, "23 units of kind 'ffn_channel' are to go, but only 22 may"),
        ({"wanted": {"kv_head": -1}}, "-1"),
        ({"wanted": {"expert": 1}}, "only 0 may"),
    ],
)
def test_what_cannot_be_is_refused(ready, options, message):
    model, groups = ready
    given = {"n_units": options.get("wanted", WANTED), "warmup_steps": 2, "period_steps": 3, **options}
    given.pop("wanted", None)
    with pytest.raises(PrunekitError, match=message):
        LHSPG(model, groups, **given)


def test_a_model_without_lora_is_refused():
    model = tiny_llama()
    with pytest.raises(PrunekitError, match="carries no LoRA"):
        LHSPG(model, discover(model), WANTED, warmup_steps=1, period_steps=1)


def test_groups_of_the_model_without_adapters_are_refused():
    groups = discover(tiny_llama()).of_kind(*KINDS)
    with pytest.raises(PrunekitError, match="discover the adapted model itself"):
        LHSPG(adapted(), groups, WANTED, warmup_steps=1, period_steps=1)
    with pytest.raises(PrunekitError, match="no group is to be pruned"):
        LHSPG(adapted(), [], WANTED, warmup_steps=1, period_steps=1)


def test_other_kinds_of_lora_are_refused():
    from peft import LoraConfig, get_peft_model

    for kind in ("use_dora", "lora_bias"):
        config = LoraConfig(target_modules=["up_proj"], **{kind: True})
        model = get_peft_model(tiny_llama(), config)
        with pytest.raises(PrunekitError, match="one plain LoRA adapter"):
            units_of(model, discover(tiny_llama()))
    model = adapted()
    model.merge_adapter()
    with pytest.raises(PrunekitError, match="merged"):
        units_of(model, [])


def test_a_rank_of_zero_is_refused():
    with pytest.raises(PrunekitError, match="r=0"):
        LoRA(r=0)


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = adapted()
    optimizer = shearing(model)
    train(model, optimizer, 4)
    before = {name: p.clone() for name, p in model.named_parameters()}
    next(p for n, p in model.named_parameters() if "lora_B" in n).grad[0, 0] = math.nan
    with pytest.raises(PrunekitError, match="not finite in step 5.*as step 4 left it"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    train(model, optimizer, optimizer.pruning_steps - 4)
    assert sum(map(len, optimizer.redundant.values())) == 8


@pytest.mark.parametrize("scores", [{}, {"x": 1}])
def test_saliency_that_says_nothing_of_a_group_is_refused(scores):
    model = adapted()
    optimizer = shearing(model, saliency=lambda _: scores)
    with pytest.raises(PrunekitError, match="saliency of .* is nothing"):
        train(model, optimizer, 2)


def test_other_states_are_refused_and_change_nothing():
    model = adapted()
    optimizer = shearing(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]).state_dict()
    states = [shearing(adapted(), **o) for o in ({"period_steps": 5}, {"n_periods": 3}, {"wanted": {"ffn_channel": 7}})]
    groups = [g for g in discover(model).of_kind("ffn_channel") if g.layer == 0]
    states += [LHSPG(adapted(), groups, {"ffn_channel": 7}, warmup_steps=2, period_steps=3, n_periods=2)]
    for state in [adamw, *(other.state_dict() for other in states)]:
        with pytest.raises(PrunekitError, match="not a state of an LHSPG"):
            optimizer.load_state_dict(state)
    fewer = shearing(adapted(targets=("up_proj", "down_proj")))
    with pytest.raises(PrunekitError, match="no state|other LoRA parameters"):
        fewer.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_interrupt_while_saliency_is_asked_loses_nothing():
    """The next step asks again: as many units go, at the same boundaries."""
    asked = []

    def saliency(optimizer):
        asked.append(optimizer.n_steps)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return update_saliency(optimizer)

    model = adapted()
    optimizer = shearing(model, saliency=saliency)
    with pytest.raises(KeyboardInterrupt):
        train(model, optimizer, 8)
    train(model, optimizer, 8 - optimizer.n_steps)
    assert asked == [2, 5, 5]
    assert optimizer.finished and sum(map(len, optimizer.redundant.values())) == sum(WANTED.values())


def test_refused_scores_leave_the_update_where_it_was():
    model = adapted()
    optimizer = shearing(model, saliency=lambda o: update_saliency(o) if o.n_steps < 5 else {})
    with pytest.raises(PrunekitError, match="saliency of"):
        train(model, optimizer, 8)
    assert optimizer.n_steps == 5
    assert any(bool(p.any()) for n, p in model.named_parameters() if "lora_B" in n)  # not merged


def test_a_plan_waits_for_the_zeros():
    model = adapted()
    optimizer = shearing(model)
    train(model, optimizer, 7)
    with pytest.raises(PrunekitError, match="step 7 of 8: not all units are zero yet"):
        optimizer.plan(discover(tiny_llama()))


def test_a_step_without_a_gradient_is_refused():
    model = adapted()
    optimizer = shearing(model)
    with pytest.raises(PrunekitError, match=r"call backward\(\) first"):
        optimizer.step()
    assert optimizer.n_steps == 0


def test_hooks_of_an_optimiser_run_once_a_step():
    model = adapted()
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # after which AdamW.step is a wrapper that runs hooks, too
    optimizer, ran = shearing(model), []
    optimizer.register_step_post_hook(lambda *_: ran.append(1))
    train(model, optimizer, 3)
    assert len(ran) == 3


def test_a_model_may_move_after_the_optimiser_was_made():
    """As the Trainer does: indices follow the tensors. There is one device here, so the tensors are fakes."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        owned = _Owned(torch.empty(4, 2, device="cuda"), 0, torch.zeros(2, 1, dtype=torch.long))
        rows = owned.rows(torch.zeros(1, dtype=torch.long))
        assert rows.device.type == "cuda"
        owned.write(torch.zeros(1, dtype=torch.long), rows)
        owned.zero(torch.zeros(1, dtype=torch.long))


def test_overlapping_groups_are_refused():
    model = adapted()
    with pytest.raises(PrunekitError, match="do not overlap"):
        units_of(model, discover(model).of_kind("kv_head", "query_head"))


def test_weights_that_train_themselves_are_refused():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(FAMILIES["opt"].model(), LoraConfig(target_modules=["fc1", "fc2"], bias="all"))
    with pytest.raises(PrunekitError, match=r"fc1.*trained itself"):
        units_of(model, discover(model).of_kind("ffn_channel"))


def test_two_adapted_modules_of_one_weight_are_refused():
    from peft import LoraConfig, get_peft_model

    base = tiny_llama()
    base.model.layers[1].mlp.up_proj.weight = base.model.layers[0].mlp.up_proj.weight
    with pytest.raises(PrunekitError, match="shares its weight"):
        lora_pairs(get_peft_model(base, LoraConfig(target_modules=["up_proj"])))
    embedding = get_peft_model(tiny_llama(), LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(PrunekitError, match="a Embedding"):
        lora_pairs(embedding)


def test_saliency_of_nothing_is_refused():
    with pytest.raises(PrunekitError, match="no group"):
        lora_saliency({})
