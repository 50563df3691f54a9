"""What sparsity.py times prunekit against: SparseGPT and SparseLLM as one would write them down from the papers.

Nothing is spared here: one column at a time, a full sort for one threshold, three factorisations for the inverse,
pseudo-inverses by singular values, explicit inverses, gradients by autograd. Both are checked against the recorded
results of the reference codes: `python benchmarks/textbook.py`.
"""

import json

import torch
from machine import shared
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

Pattern = float | tuple[int, int]  # a fraction of zeros, or (pruned, of)
BLOCK = 128


def sparsegpt(weight: Tensor, hessian: Tensor, pattern: Pattern, damping: float = 0.01) -> Tensor:
    """The pruned weight (out, in); the Hessian is damped in place."""
    weight = weight.clone()
    damp(weight, hessian, damping)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        block = weight[:, start:end].clone()
        errors = prune_block(block, upper[start:end, start:end], pattern)
        weight[:, start:end] = block
        weight[:, end:] -= errors @ upper[start:end, end:]
    return weight


def damp(weight: Tensor, hessian: Tensor, damping: float) -> None:
    """Make the Hessian one that can be inverted, and zero the weights of inputs that are always zero."""
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    weight[:, dead] = 0
    diagonal += damping * diagonal.mean()


def prune_block(block: Tensor, upper: Tensor, pattern: Pattern) -> Tensor:
    """Prune a block (out, columns) in place; the errors of its columns (out, columns)."""
    errors, costs = torch.zeros_like(block), upper.diagonal().square()
    mask = torch.zeros_like(block, dtype=torch.bool)
    if isinstance(pattern, float):
        scores = block.square() / costs
        mask = scores <= scores.flatten().sort().values[int(scores.numel() * pattern)]
    for j in range(block.shape[1]):
        if isinstance(pattern, tuple) and j % pattern[1] == 0:
            run = slice(j, j + pattern[1])
            lowest = (block[:, run].square() / costs[run]).topk(pattern[0], dim=1, largest=False).indices
            mask[:, run].scatter_(1, lowest, True)
        pruned = block[:, j].masked_fill(mask[:, j], 0)
        errors[:, j] = (block[:, j] - pruned) / upper[j, j]
        block[:, j:] -= errors[:, j : j + 1] @ upper[j : j + 1, j:]
        block[:, j] = pruned
    return errors


def sparsellm(
    weights: tuple[Tensor, Tensor, Tensor],
    activations: dict[str, Tensor],
    n_sequences: int,
    pattern: Pattern,
    n_iterations: int = 4,
    weight_of_terms: float = 5.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Up, gate and down of a LLaMA's FFN, pruned; tokens are columns.

    Args:
        weights: up (d_ff, d_model), gate (d_ff, d_model) and down (d_model, d_ff), dense.
        activations: x and y (d_model, tokens), z, s and p (d_ff, tokens) of the dense FFN.
        n_sequences: that the tokens come from.
        pattern: of each matrix.
        n_iterations: T.
        weight_of_terms: α, β and γ, which are one here.
    """
    up, gate, down = weights
    x, y, z, s, p = (activations[name] for name in "xyzsp")
    hessians = {name: x @ x.T * (2 / n_sequences) for name in ("up", "gate")}  # each is damped again in each iteration
    for iteration in range(n_iterations):
        if iteration:
            up, gate = z @ torch.linalg.pinv(x), s @ torch.linalg.pinv(x)  # as it is written, anew each time
            down = y @ torch.linalg.pinv(p)
        up, gate = sparsegpt(up, hessians["up"], pattern), sparsegpt(gate, hessians["gate"], pattern)
        down = sparsegpt(down, p @ p.T * (2 / n_sequences), pattern)
        p = best_p(down, y, functional.silu(s) * z, weight_of_terms)
        opened = functional.silu(s)
        z = (up @ x + opened * p) / (opened.square() + 1)
        s = descended_s(s, gate @ x, p, z, weight_of_terms)
    return up, gate, down


def best_p(down: Tensor, y: Tensor, hidden: Tensor, c: float) -> Tensor:
    """The p that minimises c·‖W_down·p − Y‖² + c·‖p − hidden‖²."""
    matrix = c * down.T @ down + c * torch.eye(len(hidden), dtype=down.dtype)
    return torch.linalg.inv(matrix) @ (c * down.T @ y + c * hidden)


def descended_s(s: Tensor, wanted: Tensor, p: Tensor, z: Tensor, c: float) -> Tensor:
    """The s after two gradient steps on c·‖s − wanted‖² + c·‖p − silu(s)⊙z‖²."""
    s = s.clone().requires_grad_()
    optimizer = torch.optim.SGD([s], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        loss = c * (s - wanted).square().sum() + c * (p - functional.silu(s) * z).square().sum()
        loss.backward()
        optimizer.step()
    return s.detach()


def check_sparsegpt() -> None:
    """Hold SparseGPT against the reference code's results."""
    with safe_open(shared("oracles/sparse/linear.safetensors"), "pt") as file:
        for layer in ("main_512x256", "odd_96x320_dead"):
            for tag, pattern in {"sp50": 0.5, "sp70": 0.7, "2of4": (2, 4), "4of8": (4, 8), "3of4": (3, 4)}.items():
                weight, hessian = (file.get_tensor(f"{layer}/{name}").clone() for name in "WH")
                found = sparsegpt(weight, hessian, pattern)
                tell(f"SparseGPT {layer} {tag}", found, file.get_tensor(f"{layer}/results/{tag}/W"))


def check_sparsellm() -> None:
    """Hold SparseLLM against the reference code's results."""
    with safe_open(shared("oracles/sparse/sparsellm_llama_70.safetensors"), "pt") as file:
        names = [json.loads(value) for key, value in file.metadata().items() if key.endswith("/name")]
        up, gate, down = (f"mlp.{name}_proj" for name in ("up", "gate", "down"))
        sources = {"x": (up, "inp"), "y": (down, "out"), "z": (up, "out"), "s": (gate, "out"), "p": (down, "inp")}
        activations = {key: file.get_tensor(f"captured/{of}/{side}").T for key, (of, side) in sources.items()}
        weights = tuple(file.get_tensor(f"dense/{name}/W") for name in (up, gate, down))
        found = sparsellm(weights, activations, 16, 0.7, n_iterations=len(names) // 3)
        for name, weight in zip((up, gate, down), found, strict=True):
            tell(f"SparseLLM {name}", weight, file.get_tensor(f"pruned/{name}"))


def tell(name: str, found: Tensor, recorded: Tensor) -> None:
    """Print how far apart two pruned weights are, and refuse other masks."""
    differing = int(((found == 0) != (recorded == 0)).sum())
    apart = float((found - recorded).norm() / recorded.norm())
    print(f"{name}: masks differ in {differing}, weights by {apart:.1e}")
    assert differing == 0 and apart < 1e-5, name


if __name__ == "__main__":
    check_sparsegpt()
    check_sparsellm()
