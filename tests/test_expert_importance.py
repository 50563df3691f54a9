"""Experts by their router: against what is worked out by hand, and what cannot be scored is refused."""

import pytest
import torch
from other_families import EVERYONE

import prunekit as pk
from prunekit import REAP, PrunekitError, RouterFrequency
from prunekit.importance import importance_from_name

MIXTURES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "gpt_oss",
    "granitemoe",
    "glm4_moe",
    "minimax_m2",
    "deepseek_v32",
]
TOKENS = torch.randint(40, (3, 8), generator=torch.Generator().manual_seed(0))


def experts_of(name="mixtral"):
    family = EVERYONE[name]
    return family.model(), family.groups().of_kind("expert")


@torch.no_grad()
def by_hand(model, layer):
    """REAP and the counts of a Mixtral layer, from its router and its experts as formulas."""
    block, seen = model.model.layers[layer].mlp, []
    hook = block.register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(0, 1)))
    model(input_ids=TOKENS)
    hook.remove()
    (x,) = seen
    best = (x @ block.gate.weight.T).softmax(-1).topk(2)
    weights = best.values / best.values.sum(-1, keepdim=True)
    scores, counts = [], []
    for expert in range(4):
        rows, place = (best.indices == expert).nonzero(as_tuple=True)
        gate, up = (x[rows] @ block.experts.gate_up_proj[expert].T).chunk(2, -1)
        y = (torch.nn.functional.silu(gate) * up) @ block.experts.down_proj[expert].T
        scores.append((weights[rows, place] * y.norm(dim=-1)).mean())
        counts.append(len(rows))
    return torch.stack(scores), torch.tensor(counts)


def test_scores_are_those_worked_out_by_hand():
    model, groups = experts_of()
    reap, frequency = (pk.score(model, groups, importance, TOKENS) for importance in (REAP(), RouterFrequency()))
    for group in groups:
        scores, counts = by_hand(model, group.layer)
        torch.testing.assert_close(reap[group.name], scores.double(), check_dtype=False)
        torch.testing.assert_close(frequency[group.name], counts / counts.sum(), check_dtype=False)


@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_that_adds_nothing_goes_first_however_often_it_is_chosen(name):
    family = EVERYONE[name]
    model, groups = family.model(), family.groups().of_kind("expert")
    often = {name: int(values.argmax()) for name, values in pk.score(model, groups, RouterFrequency(), TOKENS).items()}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for group in groups:
            for member in group.members:
                if "down_proj" in member.parameter:  # with its bias, where there is one
                    parameters[member.parameter][often[group.name]] = 0
    for scores in pk.score(model, groups, REAP(), TOKENS).items():
        assert scores[1][often[scores[0]]] == 0 and (scores[1] >= 0).all()
    before = {n: p.clone() for n, p in model.named_parameters()}
    pk.score(model, groups, RouterFrequency(), TOKENS)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_in_another_order_have_their_scores_in_that_order(name):
    model, groups = experts_of(name)
    before = pk.score(model, groups, REAP(), TOKENS)
    order, parameters = torch.tensor([2, 0, 3, 1]), dict(model.named_parameters())
    with torch.no_grad():
        for group in groups:
            for member in group.members:
                parameters[member.parameter].copy_(parameters[member.parameter][order])
    after = pk.score(model, groups, REAP(), TOKENS)
    for key, values in before.items():
        torch.testing.assert_close(after[key], values[order])


def test_half_the_experts_are_cut_by_their_scores():
    model, groups = experts_of()
    every = pk.discover(model)
    plan = pk.plan(every, pk.score(model, groups, importance_from_name("reap"), TOKENS), {"expert": 0.5}, of="units")
    small = pk.prune(model, plan, measure=False)
    assert small.config.num_local_experts == 2 and small(TOKENS).logits.isfinite().all()


def test_what_has_no_router_is_refused_by_name(monkeypatch):
    model, groups = experts_of()
    with pytest.raises(PrunekitError, match=r"is not a group of experts; choose groups.of_kind\('expert'\)"):
        pk.score(model, EVERYONE["mixtral"].groups().of_kind("kv_head"), REAP(), TOKENS)
    with pytest.raises(PrunekitError, match="calib"):
        pk.score(model, groups, REAP())
    monkeypatch.setattr("prunekit.importance.routing.stacked_experts", lambda _model: {})
    with pytest.raises(PrunekitError, match="are not stacked in one module, so their router's choice is not seen"):
        pk.score(model, groups, REAP(), TOKENS)


def test_another_way_of_calling_experts_is_refused_by_name():
    model, groups = experts_of()
    experts = type(model.model.layers[0].mlp.experts)

    class Other(experts):
        def forward(self, hidden_states, top_k_index, top_k_weights, scale):
            return super().forward(hidden_states, top_k_index, top_k_weights) * scale

    for layer in model.model.layers:
        layer.mlp.experts.__class__ = Other
        layer.mlp.experts.register_forward_pre_hook(
            lambda _module, args: (*args, torch.ones(1, 1, dtype=args[0].dtype))
        )
    with pytest.raises(
        PrunekitError, match="mlp.experts is not called with hidden states, chosen experts and their we"
    ):
        pk.score(model, groups, REAP(), TOKENS)
