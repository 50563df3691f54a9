"""`prunekit sparsify`: zeros in a checkpoint's weights, shapes unchanged."""

import argparse
import time
from typing import TYPE_CHECKING, Any

from prunekit.commands.accounting import held_out_windows, tell
from prunekit.commands.choosing import calibrate
from prunekit.commands.options import (
    add_command,
    add_json,
    add_model,
    listed,
    load_with_tokenizer,
    number,
    print_json,
    text_table,
)
from prunekit.errors import PrunekitError
from prunekit.files import check_new_folder

if TYPE_CHECKING:
    from prunekit.sparsity import SparsityReport

DRAWN = {"n_samples": 16, "seq_len": 64, "seed": 0}  # unless told otherwise

TEXT = """\
Zeroes weights of the matrices in the model's layers, layer after layer, and saves
the result to OUT, with what was done to each matrix in sparsity.json. Shapes stay:
a dense engine takes as long as before. OUT is complete or not there.

example:
  prunekit sparsify world --sparsity 0.7 --out sparse/
  prunekit sparsify path/to/checkpoint --pattern 2:4 --method sparsegpt \\
      --calibration text.txt --n-samples 128 --seq-len 2048 --out sparse/"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "sparsify", run, "Zero the least important weights of a model.", TEXT)
    add_model(parser)
    parser.add_argument("--out", required=True, help="folder to write; it may not exist yet")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--sparsity", type=number(float, 0, 1, below=True), help="fraction of zeros, below 1")
    target.add_argument("--pattern", type=_pattern, metavar="KEPT:OF", help="so many weights stay of every OF in a row")
    parser.add_argument("--method", default="sparsellm", help="magnitude, wanda, sparsegpt or sparsellm (default)")
    parser.add_argument("--allocation", default="uniform", help="uniform (default), or global: one budget over all")
    parser.add_argument(
        "--layers", type=listed(number(int, 0)), metavar="0,4", help="layers that get zeros (default: all)"
    )
    parser.add_argument("--calibration", metavar="TEXT", help='text file, or "world"; magnitude needs none')
    parser.add_argument("--n-samples", type=number(int, 1), help="windows of it (default: %(default)s)")
    parser.add_argument("--seq-len", type=number(int, 2), help="tokens a window (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="draws the windows (default: %(default)s)")
    parser.set_defaults(**DRAWN)
    add_json(parser)


def _pattern(text: str) -> tuple[int, ...]:
    kept, _, of = text.partition(":")
    if not (kept.isdecimal() and of.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEPT:OF, such as 2:4")
    return int(kept), int(of)


def run(args: argparse.Namespace) -> int:
    """Load, sparsify, save, print."""
    began = time.monotonic()
    check_new_folder(args.out)
    report = work(args)
    seconds = round(time.monotonic() - began, 1)
    if args.json:
        told = {"asked": report.target, "sparsity": report.sparsity, "left_dense": dict(report.left)}
        print_json({"model": args.model, "out": args.out, "method": report.method, **told,
                    "loss": report.loss.to_dict() if report.loss is not None else None,
                    "remarks": list(report.remarks), "seconds": seconds})  # fmt: skip
        return 0
    layers = [
        (number, f"{row.sparsity:.1%}", f"{row.error:.4f}" if row.error == row.error else "not measured")
        for number, row in report.by_layer().iterrows()
    ]
    print(f"{args.model} → {args.out}\n\n{text_table([('layer', 'zeros', 'output error'), *layers])}\n\n{report!r}")
    for remark in [*report.remarks, *(f"{name} stays dense: {why}" for name, why in report.left.items())]:
        print(f"- {remark}")
    print(f"in {seconds:.0f} s")
    return 0


def work(args: argparse.Namespace) -> "SparsityReport":
    """Everything from the model to the saved sparse one."""
    from prunekit.checkpoint import load, save
    from prunekit.sparsity import sparsify
    from prunekit.sparsity.sparsifying import METHODS

    if args.calibration is None and args.model == "world":
        args.calibration = "world"
    if args.method not in METHODS:
        raise PrunekitError(f"--method {args.method!r} is unknown; give one of {', '.join(METHODS)}")
    if args.calibration is None and (args.method != "magnitude" or args.allocation == "global"):
        what = f"--allocation {args.allocation}" if args.method == "magnitude" else f"--method {args.method}"
        raise PrunekitError(f"{what} reads text; give --calibration with a text file or 'world'")
    reads = args.calibration is not None
    model, tokenizer = load_with_tokenizer(args.model, "a calibration text") if reads else load(args.model)
    calib = calibrate(args, tokenizer) if reads else None
    options = {"pattern": args.pattern, "allocation": args.allocation, "layers": args.layers}
    held_out = held_out_windows(args, tokenizer, seen=reads)
    sparse = sparsify(model, calib, args.method, args.sparsity, **options, inplace=True, held_out=held_out)  # type: ignore[arg-type]
    save(sparse, args.out, tokenizer=tokenizer)
    report: SparsityReport = sparse.sparsity_report  # type: ignore[assignment]
    tell(report.loss)
    return report
