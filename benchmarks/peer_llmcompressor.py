"""llm-compressor's SparseGPT on one weight, run inside an environment of its own; `ask` is the other side of it.

Reads `weight` (out, in) and `hessian` (in, in) from a safetensors file; writes the pruned `weight` to another, whose
metadata tell the version, and what each run took in CPU and wall seconds. Only the update itself is timed, damping and
factor included, as it is on the other side.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

Taken = tuple[float, float]  # CPU and wall seconds


def ask(
    python: Path, weight: Tensor, hessian: Tensor, pattern: float | tuple[int, int], repeats: int
) -> tuple[str, Tensor, list[Taken]]:
    """llm-compressor's name with its version, its pruned weight, and its seconds.

    Args:
        python: of the environment that has it.
        weight: (out, in).
        hessian: (in, in).
        pattern: a fraction of zeros, or (pruned, of).
        repeats: how often, after once that does not count.
    """
    asked = ["--sparsity", str(pattern)] if isinstance(pattern, float) else ["--pattern", *map(str, pattern)]
    asked += ["--repeats", str(repeats), "--threads", str(torch.get_num_threads())]
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "given.safetensors"), Path(folder, "found.safetensors")
        save_file({"weight": weight, "hessian": hessian}, given)
        command, quiet = [python, __file__, given, found, *asked], {**os.environ, "LLM_COMPRESSOR_LOG_LEVEL": "ERROR"}
        subprocess.run(command, env=quiet, check=True)
        with safe_open(found, "pt") as file:
            told = {key: json.loads(value) for key, value in file.metadata().items()}
            return f"llm-compressor {told['version']}", file.get_tensor("weight").clone(), told["seconds"]


def prune(weight: Tensor, hessian: Tensor, sparsity: float, zeros: int, of: int) -> tuple[Tensor, Taken]:
    """The pruned weight, and its seconds; the Hessian is overwritten."""
    from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight  # the side that asks lacks it

    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    before = time.process_time(), time.perf_counter()
    _, pruned = sparsify_weight(
        module=module,
        hessians_dict={module: hessian},
        sparsity=sparsity,
        prune_n=zeros,
        prune_m=of,
        block_size=128,
        dampening_frac=0.01,
        preserve_sparsity_mask=False,
    )
    return pruned, (time.process_time() - before[0], time.perf_counter() - before[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("read")
    parser.add_argument("write")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", type=int, nargs=2, default=(0, 0), metavar=("ZEROS", "OF"))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    given, seconds = load_file(args.read), []
    with torch.no_grad():
        for _ in range(args.repeats + 1):
            pruned, taken = prune(given["weight"].clone(), given["hessian"].clone(), args.sparsity, *args.pattern)
            seconds.append(taken)
    told = {"version": importlib.metadata.version("llmcompressor"), "seconds": seconds[1:]}
    save_file({"weight": pruned.contiguous()}, args.write, {key: json.dumps(value) for key, value in told.items()})


if __name__ == "__main__":
    main()
