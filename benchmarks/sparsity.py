"""Time of the solvers of prunekit.sparsity, beside a textbook SparseGPT, a literal SparseLLM and llm-compressor.

1. SparseGPT on one weight, float32, half of it and 2:4. Each side starts from the same weight and Hessian; damping and
   factor count. With `--full` also the textbook in float64, and in how many entries each mask differs from its mask.
2. SparseLLM on one FFN, float64: `faithful` beside the literal form (textbook.py), which computes the same; then the
   default, and one iteration, which is SparseGPT. Errors are ‖FFN(X) − Y‖² / ‖Y‖² on the same tokens.
3. What the phases of SparseGPT reach of this machine's float32 product, timed in the same run, by nominal operations:
   2tn² for a Hessian of t tokens (half of which is not computed), n³/3 for a Cholesky factor (in float64: half of the
   peak at best), 2n³/3 with the triangular inverse, n³ for the columns.

Sides take turns. Seconds are medians, of the CPU by this process and on the wall; ratios are of CPU seconds, each to
the first row with the same `what`, as are masks and weights. What goes in is random: Gaussian weights, and activations
that share directions, as behind an RMSNorm; or, where it says mild, hardly any, so that float32 loses little.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import textbook
import torch
from machine import HERE, RESULTS, machine, save
from peer_llmcompressor import ask
from torch import Tensor
from torch.nn import functional

from prunekit.sparsity import SparseLLM, sparsegpt
from prunekit.sparsity.auxiliaries import FFN
from prunekit.sparsity.ffns import prune_ffn
from prunekit.sparsity.matrix_inputs import add_to_gram, complete_gram, factorize
from prunekit.sparsity.patterns import Pattern
from prunekit.sparsity.solvers import solve

PEER = HERE.parent / ".venv-llmcompressor" / "bin" / "python"
WIDTH = 4096
SEQUENCE = 128  # tokens; the number of sequences only scales a Hessian
SMALL, FULL = (192, 512, 1024), (768, 2048, 8192)  # d_model, d_ff, tokens
FIGURES = ("ratio", "masks_differing", "masks_agree", "weights_apart", "differing_from_float64", "ffn_error")
FIGURES += ("gflop_per_cpu_s", "share_of_peak")

Taken = tuple[float, float]  # CPU and wall seconds
Rows = list[dict[str, Any]]


def timed(work: Callable[[], Any]) -> tuple[Any, Taken]:
    before = time.process_time(), time.perf_counter()
    return work(), (time.process_time() - before[0], time.perf_counter() - before[1])


def in_turns(sides: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, Any], dict[str, list[Taken]]]:
    """What each side gives, and its seconds; they take turns at going first, and where there are several rounds, one
    more comes before them that does not count.
    """
    results: dict[str, Any] = {}
    taken: dict[str, list[Taken]] = {name: [] for name in sides}
    for repeat in range(-1 if repeats > 1 else 0, repeats):
        for name, work in [*sides.items()][:: -1 if repeat % 2 else 1]:
            results[name], seconds = timed(work)
            if repeat >= 0:
                taken[name].append(seconds)
    return results, taken


def row(what: str, variant: str, taken: list[Taken], **figures: Any) -> dict[str, Any]:
    """One row, told as it comes."""
    cpu, wall = (round(statistics.median(column), 3) for column in zip(*taken, strict=True))
    told = {"what": what, "variant": variant, "runs": len(taken), "cpu_seconds": cpu, "wall_seconds": wall}
    told |= dict.fromkeys(FIGURES, "") | figures
    print(", ".join(str(v) if k in ("what", "variant") else f"{k} {v}" for k, v in told.items() if v != ""), flush=True)
    return told


def compared(ours: list[Tensor], theirs: list[Tensor]) -> dict[str, Any]:
    """How far masks and weights are apart."""
    differing = sum(int(((a == 0) != (b == 0)).sum()) for a, b in zip(ours, theirs, strict=True))
    a, b = (torch.cat([weight.flatten() for weight in weights]) for weights in (ours, theirs))
    agree = f"{1 - differing / a.numel():.6f}"
    return {
        "masks_differing": differing,
        "masks_agree": agree,
        "weights_apart": f"{float((a - b).norm() / b.norm()):.1e}",
    }


def ratio(taken: list[Taken], to: list[Taken]) -> float:
    cpu, base = (statistics.median(seconds for seconds, _ in side) for side in (taken, to))
    return round(cpu / base, 2)


def tokens(n: int, width: int, dtype: torch.dtype) -> Tensor:
    """Activations (n, width) of size 1: directions that they share, each weaker than the last, noise, loud features."""
    strengths = torch.arange(1, width // 4 + 1, dtype=dtype) ** -0.5
    x = (torch.randn(n, len(strengths), dtype=dtype) * strengths) @ torch.randn(len(strengths), width, dtype=dtype)
    x = (x + torch.randn(n, width, dtype=dtype)) * torch.randn(width, dtype=dtype).mul(0.5).exp()
    return x / x.square().mean(1, keepdim=True).sqrt()


def mild_tokens(n: int, width: int, dtype: torch.dtype) -> Tensor:
    """Activations (n, width) that share next to no directions."""
    return torch.randn(n, width, dtype=dtype) @ (torch.eye(width) + 0.3 * torch.randn(width, width) / width**0.5)


def hessian_of(x: Tensor) -> Tensor:
    return x.T @ x * (2 * SEQUENCE / len(x))


def time_solver(repeats: int, full: bool, peer: Path | None) -> Rows:
    """SparseGPT: ours, the textbook's, and llm-compressor's where it is installed."""
    weight, rows = torch.randn(WIDTH, WIDTH) / WIDTH**0.5, []
    shared, mild = (hessian_of(make(2 * WIDTH, WIDTH, torch.float32)) for make in (tokens, mild_tokens))
    targets = (("50%", 0.5, 0.5, shared), ("2:4", "2:4", (2, 4), shared), ("50%, mild", 0.5, 0.5, mild))
    for name, sparsity, pattern, hessian in targets:
        what = f"SparseGPT {WIDTH}x{WIDTH}, {name}, float32"
        sides = {
            "prunekit": partial(sparsegpt, weight, hessian, sparsity),
            "textbook": lambda h=hessian, pattern=pattern: textbook.sparsegpt(weight, h.clone(), pattern),
        }
        results, taken = in_turns(sides, repeats)
        if full:
            double = "textbook in float64"
            results[double], seconds = timed(partial(textbook.sparsegpt, weight.double(), hessian.double(), pattern))
            taken[double] = [seconds]
        if peer:
            version, results[version], taken[version] = ask(peer, weight, hessian, pattern, repeats)
        for variant, seconds in taken.items():
            figures = compared([results["prunekit"]], [results[variant]]) if variant != "prunekit" else {}
            if full:
                figures["differing_from_float64"] = compared([results[double]], [results[variant]])["masks_differing"]
            rows.append(row(what, variant, seconds, ratio=ratio(seconds, taken["prunekit"]), **figures))
    return rows


def time_ffn(d_model: int, d_ff: int, n_tokens: int, repeats: int) -> Rows:
    """SparseLLM: ours, faithful and not, and the literal form on the same FFN."""
    what = f"SparseLLM {d_model}/{d_ff}, {n_tokens} tokens, 70%, float64"
    up, gate = (torch.randn(d_ff, d_model, dtype=torch.float64) / d_model**0.5 for _ in range(2))
    weights, x = (
        (up, gate, torch.randn(d_model, d_ff, dtype=torch.float64) / d_ff**0.5),
        tokens(n_tokens, d_model, up.dtype),
    )
    z, s = x @ up.T, x @ gate.T
    p = functional.silu(s) * z
    y, n_sequences = p @ weights[2].T, n_tokens // SEQUENCE
    columns = {name: tensor.T.contiguous() for name, tensor in {"x": x, "y": y, "z": z, "s": s, "p": p}.items()}

    def ours(method: SparseLLM) -> list[Tensor]:
        named = dict(zip(("up", "gate", "down"), weights, strict=True))
        ffn = FFN(named, {}, functional.silu, x, y, z.clone(), s.clone(), p.clone())
        return list(prune_ffn(ffn, n_sequences, Pattern(0.7), method).weights.values())

    def error(found: list[Tensor]) -> str:
        hidden = functional.silu(x @ found[1].T) * (x @ found[0].T)
        return f"{float((hidden @ found[2].T - y).norm() ** 2 / y.norm() ** 2):.5f}"

    methods = {"faithful": SparseLLM(faithful=True), "proximal": SparseLLM(), "T = 1": SparseLLM(n_iterations=1)}
    sides: dict[str, Callable] = {
        f"prunekit, {name}": lambda method=method: ours(method) for name, method in methods.items()
    }
    sides["literal"] = lambda: list(textbook.sparsellm(weights, columns, n_sequences, 0.7))
    results, taken = in_turns(sides, repeats)
    first = next(iter(sides))
    apart = {"literal": compared(results[first], results["literal"])}
    return [
        row(what, v, t, ratio=ratio(t, taken[first]), ffn_error=error(results[v]), **apart.get(v, {}))
        for v, t in taken.items()
    ]


def time_phases(repeats: int) -> Rows:
    """What each phase of SparseGPT reaches of this machine's matrix product."""
    n, t = WIDTH, WIDTH // 2
    x, weight, total = tokens(t, n, torch.float32), torch.randn(n, n) / n**0.5, torch.zeros(n, n)
    taken: dict[str, list[Taken]] = {}

    def hessian(into: Tensor) -> None:
        add_to_gram(into, x)
        complete_gram(into)

    def noted(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result, seconds = timed(lambda: work(*args, **kwargs))
            taken.setdefault(name, []).append(seconds)
            return result

        return run

    parts = {"cholesky_ex": "factor: Cholesky, float64"}
    wrapped = {name: noted(called, getattr(torch.linalg, name)) for name, called in parts.items()}
    for _ in range(repeats):
        noted("matrix product", torch.matmul)(weight, weight)
        noted("Hessian", hessian)(total.zero_())
        with mock.patch.multiple(torch.linalg, **wrapped):
            factor = noted("factor", factorize)(total * (2 * SEQUENCE / t))
        noted("columns", solve)(weight, factor, Pattern(0.5))
    counts = dict.fromkeys(parts.values(), n**3 / 3)
    counts |= {"matrix product": 2 * n**3, "Hessian": 2 * t * n**2, "factor": 2 * n**3 / 3, "columns": n**3}
    speeds = {name: counts[name] / 1e9 / statistics.median(cpu for cpu, _ in s) for name, s in taken.items()}
    peak = speeds["matrix product"]
    return [
        row(f"phase, {n}x{n}, {t} tokens", name, seconds, gflop_per_cpu_s=round(speeds[name], 1),
            share_of_peak=f"{speeds[name] / peak:.3f}")
        for name, seconds in taken.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="also an FFN of 768/2048 on 8192 tokens: minutes")
    parser.add_argument("--repeats", type=int, default=3, help="median of so many; the FFN of --full runs once")
    parser.add_argument("--parts", nargs="+", choices=("solver", "ffn", "phases"), default=("phases", "ffn", "solver"))
    parser.add_argument("--peer", type=Path, default=PEER, help="a Python that has llm-compressor; left out if missing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder")
    args = parser.parse_args()
    machine()  # the commit that is measured, whatever comes later
    print(
        f"{torch.get_num_threads()} thread(s), load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    work = {
        "phases": lambda: time_phases(args.repeats),
        "ffn": lambda: time_ffn(*SMALL, args.repeats) + (time_ffn(*FULL, 1) if args.full else []),
        "solver": lambda: time_solver(args.repeats, args.full, args.peer if args.peer.exists() else None),
    }
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    save([told for part in args.parts for told in work[part]()], args.out / "sparsity.csv")


if __name__ == "__main__":
    main()
