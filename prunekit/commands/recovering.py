"""`prunekit recover`: train a cut model to win back what it lost."""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.commands.accounting import held_out_of, tell
from prunekit.commands.options import (
    add_command,
    add_json,
    add_model,
    load_with_tokenizer,
    number,
    print_json,
    text_table,
)
from prunekit.files import check_new_folder

if TYPE_CHECKING:
    from prunekit.recovery import LoRA
    from prunekit.recovery.log import RecoveryLog

TEXT = """\
Trains small low-rank updates (LoRA) of the model's projections on a text, merges
them into the weights and saves the result to OUT, with the loss of each step in
recovery.json. The last twentieth of the text (at most 1,024 tokens) is held out, to
measure the loss before and after. Where sparsity.json tells of zeros in the weights, they stay zero.
OUT is complete or not there.

example:
  prunekit recover small/ --data text.txt --out recovered/
  prunekit recover small/ --data world --r 8 --epochs 2 --out recovered/"""
SETTINGS = ("r", "alpha", "dropout", "learning_rate", "batch_size", "epochs", "max_steps", "seq_len", "seed")
CARRIED = ("plan.json", "README.md")


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "recover", run, "Train a pruned model to win back what it lost.", TEXT)
    add_model(parser)
    parser.add_argument("--data", required=True, metavar="TEXT", help='.txt, .json or .jsonl file, or "world"')
    parser.add_argument("--out", required=True, help="folder to write; it may not exist yet")
    parser.add_argument(
        "--preset", choices=("paper",), help="LLM-Pruner's settings, for models of billions of parameters"
    )
    parser.add_argument("--r", type=number(int, 1), help="rank of the update (default: 8)")
    parser.add_argument("--alpha", type=number(float, 0, above=True), help="its scale is alpha / r (default: 16)")
    parser.add_argument("--dropout", type=number(float, 0, 1, below=True), help="on its input (default: 0.05)")
    parser.add_argument("--learning-rate", type=number(float, 0, above=True), help="peak (default: 0.003)")
    parser.add_argument(
        "--batch-size", type=number(int, 1), help="windows a step (default: 8, fewer where data is short)"
    )
    parser.add_argument("--epochs", type=number(float, 0, above=True), help="passes over the data (default: 2)")
    parser.add_argument("--max-steps", type=number(int, 1), help="stop after so many steps (default: by epochs)")
    parser.add_argument(
        "--seq-len", type=number(int, 2), help="tokens a window (default: 128, fewer where the model takes fewer)"
    )
    parser.add_argument("--seed", type=int, help="of the training (default: 0)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Load, recover, save, print."""
    began = time.monotonic()
    check_new_folder(args.out)
    log = train(args, choose_method(args))
    seconds = round(time.monotonic() - began, 1)
    first, last = first_and_last(log)
    if args.json:
        change = log.loss_change.to_dict() if log.loss_change is not None else None
        figures = {"steps": len(log.losses), "loss_first": first, "loss_last": last, "loss": change}
        print_json({"model": args.model, "out": args.out, **figures, "method": log.method, "seconds": seconds})
        return 0
    rows = [("", "first", "last", "steps"), ("loss", f"{first:.3f}", f"{last:.3f}", len(log.losses))]
    print(f"{args.model} → {args.out}\n\n{text_table(rows)}\n\n{log.trainable:,} weights trained, in {seconds:.0f} s")
    print(log.loss_change)
    return 0


def choose_method(args: argparse.Namespace) -> "LoRA":
    """LoRA, or the paper's, with the settings that were given."""
    from prunekit.recovery import LoRA

    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    return replace(LoRA.paper() if args.preset == "paper" else LoRA(), **given)


def train(args: argparse.Namespace, method: "LoRA") -> "RecoveryLog":
    """Everything from the model to the saved recovered one."""
    from prunekit.checkpoint import save
    from prunekit.models import max_positions
    from prunekit.recovery import recover
    from prunekit.recovery.data import token_windows

    model, tokenizer = load_with_tokenizer(args.model, "training on text")
    if args.seq_len is None:
        method = replace(method, seq_len=min(method.seq_len, max_positions(model) or method.seq_len))
    data, held_out = held_out_of(token_windows(args.data, tokenizer, method.seq_len))
    recovered = recover(model, method, data, inplace=True, held_out=held_out)
    log: RecoveryLog = recovered.recovery_log  # type: ignore[assignment]
    save(recovered, args.out, tokenizer=tokenizer, files=files(args, log))
    tell(log.loss_change)
    return log


def first_and_last(log: "RecoveryLog") -> tuple[float, float]:
    """The mean loss of the first and of the last tenth of the steps: single batches jump."""
    n = max(1, len(log.losses) // 10)
    return sum(log.losses[:n]) / n, sum(log.losses[-n:]) / n


def files(args: argparse.Namespace, log: "RecoveryLog") -> dict[str, str]:
    """The loss curve, and what stood beside the pruned model: its plan, and its card with a section added."""
    folder = Path(args.model)
    pruned = any((folder / name).is_file() for name in ("plan.json", "sparsity.json"))
    here = [name for name in CARRIED if pruned and (folder / name).is_file()]
    carried = {name: (folder / name).read_text(encoding="utf-8") for name in here}
    first, last = first_and_last(log)
    section = (
        f"\n## Recovered\n\n`{log.method}` on {log.n_tokens:,} tokens, {len(log.losses)} steps: "
        f"loss {first:.3f} → {last:.3f} (`recovery.json`). Before and after: {log.loss_change}.\n"
    )
    before = carried.get("README.md", f"# A model trained by prunekit\n\n- Made from: `{args.model}`\n")
    return {**carried, "README.md": before + section, "recovery.json": json.dumps(log.to_dict(), indent=1)}
