"""How discovery traces a model, what it locks, and what its groups are as values."""

from functools import partial

import numpy as np
import pytest
import torch
from families import COMMON, FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from prunekit import PrunekitError, discover
from prunekit.discovery.labels import LabelGraph, levels, varying_dims
from prunekit.discovery.partition import _tangled
from prunekit.discovery.stored_integers import Remembered, remembering
from prunekit.discovery.tracing import trace


def test_members_are_the_rows_and_columns_of_a_llama_layer():
    model = FAMILIES["llama_gqa"].model()
    groups = discover(model)
    heads = {m.parameter.rsplit(".", 2)[-2]: m for m in groups["model.layers.1.self_attn:kv_head"].members}
    assert {k: (m.dim, m.width) for k, m in heads.items()} == {
        "q_proj": (0, 16), "k_proj": (0, 8), "v_proj": (0, 8), "o_proj": (1, 16)
    }  # fmt: skip
    # a KV group owns its own query heads, not those a stride away
    assert heads["q_proj"].index[1].tolist() == list(range(16, 32))
    channels = groups["model.layers.0.mlp:ffn_channel"]
    assert [(m.parameter.rsplit(".", 2)[-2], m.dim) for m in channels.members] == [
        ("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)
    ]  # fmt: skip


def test_groups_are_values_that_print_and_tabulate():
    groups = discover(FAMILIES["llama_mha"].model())
    assert repr(groups).startswith("Groups(2 kv_head, 2 ffn_channel, 1 hidden, ") and "4 block, 2 layer" in repr(groups)
    assert set(groups.table().columns) == {"group", "kind", "layer", "n_units", "exact", "parameter", "dim", "width"}
    assert "kv_head" in groups._repr_html_()
    assert groups[0] is next(iter(groups)) and len(groups[:2]) == 2
    with pytest.raises(PrunekitError, match="no group is called 'nowhere'"):
        groups["nowhere"]


def test_no_weights_are_needed():
    config = LlamaConfig(**COMMON, intermediate_size=96)
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    real = discover(LlamaForCausalLM(config))
    found = discover(empty)
    assert [(g.name, g.n_units) for g in found] == [(g.name, g.n_units) for g in real]
    assert all(p.is_meta for p in empty.parameters())


def test_a_trace_leaves_the_model_as_it_was():
    model = FAMILIES["gpt2"].model().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    remembered = [(type(v), v) for m in model.modules() for v in vars(m).values() if isinstance(v, int)]
    discover(model)
    assert model.training and all(m.training for m in model.modules())
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())
    assert [(type(v), v) for m in model.modules() for v in vars(m).values() if isinstance(v, int)] == remembered


class Sorted(nn.Module):
    """Sorts its channels: nothing may be said of them."""

    def forward(self, x):
        return x.sort(-1).values


class Assembled(nn.Module):
    """Builds its result by writing into an empty tensor, as latent attention builds its keys."""

    def forward(self, x):
        out = x.new_empty(x.shape)
        out[..., :40] = torch.relu(x[..., :40])
        out[..., 40:] = x[..., 40:]
        return out


def _llama_with_activation(activation):
    model = LlamaForCausalLM(LlamaConfig(**COMMON, intermediate_size=96))
    model.model.layers[0].mlp.act_fn = activation
    return model


def test_what_is_not_understood_is_locked_by_name_and_the_rest_is_found():
    groups = discover(_llama_with_activation(Sorted()))
    assert {(g.kind, g.layer) for g in groups.of_kind("kv_head", "query_head", "ffn_channel")} == {
        ("kv_head", 0), ("kv_head", 1), ("ffn_channel", 1)
    }  # fmt: skip
    reason = groups.locked["model.layers.0.mlp.gate_proj.weight[dim 0]"]
    assert "sort is not understood" in reason and "model.layers.0.mlp.act_fn" in reason


def test_labels_survive_writes_into_empty_tensors():
    groups = discover(_llama_with_activation(Assembled()))
    assert groups["model.layers.0.mlp:ffn_channel"].n_units == 96


def test_a_fixed_matrix_locks_what_it_mixes():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("rotation", torch.randn(96, 96))

        def forward(self, x):
            return x @ self.rotation

    groups = discover(_llama_with_activation(Mixed()))
    assert not [g for g in groups.of_kind("ffn_channel") if g.layer == 0]
    assert "carries no labels" in groups.locked["model.layers.0.mlp.gate_proj.weight[dim 0]"]


def test_a_constant_that_differs_by_channel_pins_them():
    class Scaled(nn.Module):
        def forward(self, x):
            return x * torch.linspace(1, 2, 96)

    groups = discover(_llama_with_activation(Scaled()))
    assert "differs from channel to channel" in groups.locked["model.layers.0.mlp.up_proj.weight[dim 0]"]


class Signed(nn.Module):
    """Multiplies by ones, half of which were overwritten: no constant of equal values any more."""

    def forward(self, x):
        signs = torch.ones_like(x)
        signs[..., 1::2] = -1
        return x * signs


def test_a_constant_that_was_written_to_is_no_longer_uniform():
    assert not [g for g in discover(_llama_with_activation(Signed())).of_kind("ffn_channel") if g.layer == 0]


def test_what_never_runs_is_locked():
    model = _llama_with_activation(nn.ReLU())
    model.model.layers[0].unused = nn.Linear(8, 12)
    groups = discover(model)
    assert "takes no part" in groups.locked["model.layers.0.unused.weight[dim 0]"]
    assert not any("unused" in g.name for g in groups)


def test_the_value_that_pads_is_no_label():
    class Padded(nn.Module):
        def forward(self, x):
            return nn.functional.pad(torch.relu(x), (1, 0), value=15.0)[..., 1:]

    groups = discover(_llama_with_activation(Padded()))
    assert groups["model.layers.0.mlp:ffn_channel"].n_units == 96 and groups.of_kind("hidden")[0].n_units == 64


def test_low_rank_projections_are_called_rank():
    class LowRank(LlamaMLP):
        def __init__(self, config):
            super().__init__(config)
            self.narrow = nn.Linear(96, 5, bias=False)
            self.wide = nn.Linear(5, 96, bias=False)

        def forward(self, x):
            return self.down_proj(self.wide(self.narrow(self.act_fn(self.gate_proj(x)) * self.up_proj(x))))

    config = LlamaConfig(**COMMON, intermediate_size=96)
    model = LlamaForCausalLM(config)
    model.model.layers[1].mlp = LowRank(config)
    ranks = discover(model).of_kind("rank")
    assert sorted(g.n_units for g in ranks) == [5, 96]  # 96: wide feeds down_proj without a nonlinearity


def test_widths_are_seen_however_they_are_handed_over():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.half = 48

        def forward(self, x):
            left, right = x.narrow(dim=-1, start=0, length=self.half), x.narrow(-1, start=self.half, length=self.half)
            pairs = left.unflatten(dim=-1, sizes=(self.half // 2, 2))
            normed = nn.functional.layer_norm(input=right, normalized_shape=(self.half,))
            return torch.cat((pairs.flatten(-2), normed), -1)

    model = _llama_with_activation(Keywords())
    numbers = {a.key for e in trace(model).equations for a in e.expression.attributes() if "half" in a.key}
    assert numbers == {("model.layers.0.mlp.act_fn", "", "half")}
    wheres = [e.where for e in trace(model).equations if "act_fn" in e.where]
    assert len(wheres) == 5  # lengths of both, start of the second, what is unflattened, the norm


def test_what_a_forward_pass_keeps_on_its_modules_is_gone_after_a_trace():
    class Keeping(nn.Module):
        def forward(self, x):
            self.seen, self._buffers["last"] = x, x
            return torch.relu(x)

    keeping = Keeping()
    discover(_llama_with_activation(keeping))
    assert not hasattr(keeping, "seen") and not dict(keeping.named_buffers())


def test_what_is_no_model_is_refused():
    for thing in (None, "model", nn.Identity()):
        with pytest.raises(PrunekitError, match="is not allowed; give a causal language model with parameters"):
            discover(thing)


def test_a_model_that_does_not_run_is_refused_by_name():
    model = LlamaForCausalLM(LlamaConfig(**COMMON, intermediate_size=96))
    model.model.layers[1].mlp.down_proj = nn.Linear(95, 64)
    with pytest.raises(PrunekitError, match=r"does not run on one token.*model.layers.1.mlp.down_proj"):
        discover(model)


def test_remembered_integers_keep_their_origin_through_arithmetic():
    module = nn.Module()
    module.n_heads, module.sizes, module.flag = 4, [2, 3], True
    with remembering(module):
        product = (module.n_heads * 8 + 2 - 1) // 3
        assert isinstance(product, Remembered) and product == 11
        assert product.origin.evaluate({("", "", "n_heads"): 1}) == 3
        assert (10 - module.n_heads).origin.evaluate({("", "", "n_heads"): 3}) == 7
        assert module.sizes[1].origin.key == ("", "", "sizes[1]")
        assert module.flag is True and not isinstance(module.n_heads * 0.5, Remembered)
    assert type(module.n_heads) is int and module.sizes == [2, 3]


def test_where_remembered_integers_arrive_is_noted():
    seen = {e.expression.key[-1] for e in trace(FAMILIES["gpt2"].model()).equations if hasattr(e.expression, "key")}
    assert {"split_size", "nf", "head_dim"} <= seen


@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_varying_dimensions_are_those_along_which_labels_differ(shape):
    labels = torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)).expand(shape)
    assert varying_dims(labels) == (frozenset({0}) if shape[0] > 1 else frozenset())
    assert varying_dims(labels.contiguous()) == varying_dims(labels)


def test_nodes_know_what_made_them():
    graph = LabelGraph()
    first, second = graph.new((3,), "parameter"), graph.new((2, 2), "score")
    assert graph.kind_of(first) == "parameter" and graph.kind_of(second[1]) == "score"
    assert graph.kind_of(torch.zeros(2, dtype=torch.long)) is None


def closed(graph, merging):
    """Components by the definition: merge what is related, then owners whose members agree, until nothing changes."""
    label = np.arange(graph.n_nodes)
    owned: dict = {}
    for owner, member in (pair for kind in graph.owns.values() for edge in kind for pair in zip(*edge, strict=True)):
        owned.setdefault(owner, []).append(member)
    joined = [pair for edge in graph.same for pair in zip(*edge, strict=True)]
    joined += [pair for kind in merging for edge in graph.owns[kind] for pair in zip(*edge, strict=True)]
    while True:
        for a, b in joined:
            label[label == label[a]] = label[b]
        settled = {owner: members[0] for owner, members in owned.items() if len(set(label[members])) == 1}
        joined = [(owner, member) for owner, member in settled.items() if label[owner] != label[member]]
        if not joined:
            return label


NODES = st.lists(st.tuples(st.integers(2, 13), st.integers(2, 13)), max_size=5)


@settings(deadline=None)
@given(same=NODES, owns=st.dictionaries(st.sampled_from(["score", "activation", "parameter", "statistic"]), NODES))
def test_a_level_built_on_the_one_below_is_what_its_relations_say(same, owns):
    graph = LabelGraph()
    graph.new((12,), "parameter")
    for pairs, add in [(same, graph.unify), *((pairs, partial(graph.own, kind)) for kind, pairs in owns.items())]:
        if pairs:
            add(*torch.tensor(pairs).T)
    for merging, found in zip([(), ("score",), ("score", "activation")], levels(graph), strict=True):
        expected = closed(graph, merging)
        assert np.array_equal(found[:, None] == found, expected[:, None] == expected)


@pytest.mark.parametrize(
    ("marks", "ragged"),
    [
        ([[1, 1], [2, 2]], set()),  # rows can go
        ([[1, 2], [3, 4]], {1, 2, 3, 4}),  # single elements cannot
        ([[1, 1], [2, 3]], {2, 3}),  # a row that is whole beside one that is not: 1 can go
    ],
)
def test_what_fills_no_whole_slab_is_ragged(marks, ragged):
    assert {int(m) for part in _tangled(np.array([marks, [[5, 5], [6, 6]]])) for m in part.ravel()} == ragged


def test_several_tokens_may_run_through_writes_in_place():
    """As torch's own RMSNorm writes; a cut of heads with slopes looks at several tokens."""
    model = nn.Sequential(nn.Embedding(5, 8), nn.RMSNorm(8), nn.Linear(8, 5))
    assert trace(model, (2, 3)).graph.n_nodes > 0


class Masked(LlamaMLP):
    """Fills its channels where one number, expanded to all of them, says so."""

    def forward(self, x):
        hidden = self.up_proj(x)
        return self.down_proj(hidden.masked_fill((torch.zeros(1) > 1).expand_as(hidden), -1.0))


def test_a_number_that_is_expanded_pins_nothing():
    model = LlamaForCausalLM(config := LlamaConfig(**COMMON, intermediate_size=96))
    model.model.layers[1].mlp = Masked(config)
    assert discover(model)["model.layers.1.mlp:ffn_channel"].n_units == 96


class Hashed(nn.Module):
    """A language model whose second table is looked up by a number that it computes from the tokens."""

    def __init__(self):
        super().__init__()
        self.plain, self.hashed = nn.Embedding(48, 16), nn.Embedding(8, 16)
        self.head = nn.Linear(16, 48, bias=False)

    def forward(self, tokens):
        return {"logits": self.head(self.plain(tokens) + self.hashed(tokens % 8))}


def test_a_vocabulary_whose_numbers_are_computed_with_is_locked():
    groups = discover(Hashed())
    assert not groups.of_kind("vocabulary")
    assert "also computed with (remainder)" in groups.locked["plain.weight[dim 0]"]
    assert "head.weight[dim 0]" in groups.locked


def test_a_group_is_in_the_groups_by_its_name_and_as_itself():
    groups = discover(FAMILIES["llama_gqa"].model())
    assert groups[0].name in groups and groups[0] in groups
    assert "model.layers.9.mlp:ffn_channel" not in groups and None not in groups
    assert groups[0] not in groups.without([groups[0].name])
