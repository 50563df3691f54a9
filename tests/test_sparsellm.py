"""SparseLLM on one FFN: the reference's own steps, what its default does better, and what it refuses."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from shared import shared_path
from torch import nn
from torch.nn import functional

from prunekit.errors import PrunekitError
from prunekit.sparsity import SparseLLM
from prunekit.sparsity.auxiliaries import FFN, toward_activation
from prunekit.sparsity.ffns import prune_ffn
from prunekit.sparsity.matrix_inputs import factorize
from prunekit.sparsity.patterns import Pattern
from prunekit.sparsity.solvers import solve

NAMES = {"opt": ("fc1", None, "fc2"), "llama": ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")}
SEQUENCES, SEVENTY = 16, Pattern(0.7)


def captured(family):
    """The FFN of the oracle, its tensors, and the names of its snapshots."""
    path = shared_path("oracles", "sparse", f"sparsellm_{family}_70.safetensors")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = {name: json.loads(value) for name, value in file.metadata().items()}
    up, gate, down = NAMES[family]
    names = {"up": up, "gate": gate, "down": down}
    ffn = FFN(
        {name: tensors[f"dense/{theirs}/W"] for name, theirs in names.items() if theirs},
        {name: tensors[f"dense/{theirs}/b"] for name, theirs in names.items() if f"dense/{theirs}/b" in tensors},
        torch.relu if family == "opt" else functional.silu,
        tensors[f"captured/{up}/inp"], tensors[f"captured/{down}/out"], tensors[f"captured/{up}/out"],
        tensors.get(f"captured/{gate}/out"), tensors[f"captured/{down}/inp"],
    )  # fmt: skip
    return ffn, tensors, facts


def random_ffn(gated, activation, n=400, d=24, d_ff=48, seed=0, scale=1.0):
    """A dense FFN with what goes through it, float64; inputs as behind a LayerNorm that nearly loses a direction."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g).double()
    x = functional.layer_norm(x * torch.logspace(-4, 0.5, d).double(), (d,)) * scale
    up, gate = torch.randn(2, d_ff, d, generator=g).double() / d**0.5
    down = torch.randn(d, d_ff, generator=g).double() / d_ff**0.5
    bias = None if gated else torch.randn(d_ff, generator=g).double() / 4
    z, s = functional.linear(x, up, bias), x @ gate.T if gated else None
    p = activation(z) if s is None else activation(s) * z
    weights = {"up": up, "gate": gate, "down": down} if gated else {"up": up, "down": down}
    return FFN(weights, {} if gated else {"up": bias}, activation, x, p @ down.T, z, s, p)


@pytest.mark.parametrize("family", NAMES)
def test_the_faithful_variant_makes_every_step_of_the_reference(family):
    ffn, tensors, facts = captured(family)
    names, calls = dict(zip(("up", "gate", "down"), NAMES[family], strict=True)), []
    prune_ffn(ffn, SEQUENCES, SEVENTY, SparseLLM(faithful=True), watch=lambda *call: calls.append(call))
    assert len(calls) == sum(name.endswith("W_out") for name in tensors)
    for k, (name, before, after) in enumerate(calls):
        assert names[name] == facts[f"snapshots/{k}/name"]
        for mine, theirs in ((before, f"snapshots/{k}/W_in"), (after, f"snapshots/{k}/W_out")):
            assert float((mine - tensors[theirs]).norm() / tensors[theirs].norm()) < 1e-12, (k, theirs)
        assert torch.equal(after == 0, tensors[f"snapshots/{k}/W_out"] == 0), k


@pytest.mark.parametrize("family", NAMES)
def test_the_default_leaves_less_error_than_the_reference_and_sparsegpt(family):
    faithful = prune_ffn(captured(family)[0], SEQUENCES, SEVENTY, SparseLLM(faithful=True))
    ours = prune_ffn(captured(family)[0], SEQUENCES, SEVENTY)
    assert ours.errors[0] == pytest.approx(faithful.errors[0], rel=1e-9)  # both begin with SparseGPT
    assert ours.errors[-1] < faithful.errors[-1] < faithful.errors[0]
    assert ours.kept == 3


@pytest.mark.parametrize("gated", [False, True])
def test_one_iteration_is_sparsegpt(gated):
    ffn = random_ffn(gated, functional.silu)
    done = prune_ffn(ffn, 4, SEVENTY, SparseLLM(n_iterations=1))
    for name, inputs in (("up", ffn.x), ("down", ffn.p)):
        expected = solve(ffn.weights[name], factorize(inputs.T @ inputs * (2 / 4)), SEVENTY)
        torch.testing.assert_close(done.weights[name], expected, rtol=1e-9, atol=1e-12)
    assert done.kept == 0 and len(done.errors) == 1


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("pattern", [Pattern(0.8), Pattern(0.5, 4)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_iterations_never_blow_up_behind_a_layer_norm(gated, pattern, scale):
    """Where the undamped pseudo-inverse of the reference explodes; and where z is so large that its steps overshoot."""
    done = prune_ffn(random_ffn(gated, torch.relu, scale=scale), 4, pattern, SparseLLM(n_iterations=6))
    assert min(done.errors) == done.errors[done.kept] <= done.errors[0]
    assert max(done.errors) < 1.05 * done.errors[0]
    for weight in done.weights.values():
        assert abs(float((weight == 0).double().mean()) - pattern.sparsity) < 0.01


@pytest.mark.parametrize("activation", [torch.relu, functional.silu, functional.gelu, torch.tanh])
@pytest.mark.parametrize("gated", [False, True])
def test_errors_are_those_of_the_pruned_ffn(activation, gated):
    ffn = random_ffn(gated, activation)
    done = prune_ffn(replace(ffn, z=ffn.z.clone(), s=None if ffn.s is None else ffn.s.clone(), p=ffn.p.clone()), 4,
                     SEVENTY)  # fmt: skip
    z = functional.linear(ffn.x, done.weights["up"], ffn.biases.get("up"))
    hidden = activation(ffn.x @ done.weights["gate"].T) * z if gated else activation(z)
    error = (hidden @ done.weights["down"].T - ffn.y).square().sum() / ffn.y.square().sum()
    assert float(error) == pytest.approx(done.errors[done.kept], rel=1e-6)


def test_relu_is_solved_exactly():
    p, m = torch.randn(2, 500, generator=torch.Generator().manual_seed(0)).double()
    z = toward_activation(torch.relu, p, m, torch.zeros_like(p), 0.3, 0.7)
    grid = torch.linspace(-6, 6, 6001).double()[:, None]
    best = (0.7 * (p - grid.relu()).square() + 0.3 * (grid - m).square()).min(0).values
    reached = 0.7 * (p - z.relu()).square() + 0.3 * (z - m).square()
    assert bool((reached <= best + 1e-12).all())


@pytest.mark.parametrize("activation", [functional.silu, functional.gelu, torch.tanh, nn.Softplus()])
@pytest.mark.parametrize("gated", [False, True])
def test_other_activations_never_get_worse(activation, gated):
    p, m, z, factor = 3 * torch.randn(4, 500, generator=torch.Generator().manual_seed(0)).double()
    c = factor if gated else torch.ones_like(p)

    def objective(at):
        return 5 * (p - activation(at) * c).square() + 5 * (at - m).square()

    found = toward_activation(activation, p, m, z, 5.0, 5.0, c if gated else None)
    assert bool((objective(found) <= torch.minimum(objective(m), objective(z)) + 1e-9).all())
    assert float(objective(found).sum()) < 0.95 * float(torch.minimum(objective(m), objective(z)).sum())


def test_tokens_in_portions_are_tokens_at_once(monkeypatch):
    ffns = [random_ffn(True, functional.silu) for _ in range(2)]
    whole = prune_ffn(ffns[0], 4, SEVENTY)
    monkeypatch.setattr("prunekit.sparsity.auxiliaries.TOKENS_AT_ONCE", 64)
    portions = prune_ffn(ffns[1], 4, SEVENTY)
    assert portions.errors == pytest.approx(whole.errors, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": math.nan}, "reads is not finite"),
        ({"p": math.inf}, "passes to its down projection is not finite"),
        ({"x": 0.0}, "reads is zero"),
        ({"p": 0.0}, "passes to its down projection is zero"),
    ],
)
def test_activations_that_say_nothing_are_refused(change, message):
    ffn = random_ffn(True, functional.silu)
    ((name, value),) = change.items()
    with pytest.raises(PrunekitError, match=message):
        prune_ffn(replace(ffn, **{name: torch.full_like(getattr(ffn, name), value)}), 4, SEVENTY)


@pytest.mark.parametrize(
    "options", [{"n_iterations": 0}, {"faithful": "yes"}, {"alpha": 0.0}, {"beta": -1.0}, {"gamma": math.nan}]
)
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(PrunekitError, match="is not allowed"):
        SparseLLM(**options)
