"""`prunekit export`: a checkpoint in a form that other programs load."""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

from prunekit.commands.cutting import n_parameters
from prunekit.commands.options import add_command, add_json, add_model, print_json, text_table
from prunekit.files import check_new_folder
from prunekit.layouts import GGUF, LAYOUTS

TEXT = """\
Writes a folder that loads without prunekit, proved to give the same logits:
plain for what the family's own configuration can say; padded fills layers of
uneven widths up to even ones with zeros; gguf writes model.gguf for llama.cpp,
for what is plain. OUT is complete or not there.

example:
  prunekit export small/ --layout padded --out even/
  prunekit export path/to/plain --layout gguf --out for_llama_cpp/"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "export", run, "Write a checkpoint for programs that know no prunekit.", TEXT)
    add_model(parser)
    parser.add_argument("--out", required=True, help="folder to write; it may not exist yet")
    parser.add_argument("--layout", default="plain", choices=LAYOUTS, help="default: %(default)s")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="of the files written, such as 1GB")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Load, export, print."""
    from transformers import AutoConfig

    from prunekit.checkpoint import load
    from prunekit.models import empty_model
    from prunekit.pruning import PruningPlan

    check_new_folder(args.out)
    model, tokenizer = load(args.model)
    cut_by = Path(args.model) / "plan.json"
    options: dict[str, Any] = {"plan": PruningPlan.load(cut_by)} if cut_by.is_file() else {}
    options |= {} if args.max_shard_size is None else {"max_shard_size": args.max_shard_size}
    out = export_saying(model, args.out, layout=args.layout, tokenizer=tokenizer, **options)
    before = n_parameters(model)
    after = before if args.layout == GGUF else n_parameters(empty_model(AutoConfig.from_pretrained(out)))
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    if args.json:
        counts = {"n_parameters": before, "n_parameters_written": after}
        print_json({"model": args.model, "out": args.out, "layout": args.layout, **counts, "files": files})
        return 0
    print(f"{args.model} → {args.out}, {args.layout}\n")
    print(f"{before:,} parameters before, {after:,} after\n")
    print(text_table([("", "bytes"), *((name, f"{size:,}") for name, size in files.items())]))
    return 0


def export_saying(*args: Any, **options: Any) -> Path:
    """`export`, with what it warns of on standard error."""
    from prunekit.checkpoint import export
    from prunekit.checkpoint.gguf import NoVocabulary

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", NoVocabulary)
        out = export(*args, **options)
    for warning in told:
        if issubclass(warning.category, NoVocabulary):
            print(f"prunekit: {warning.message}", file=sys.stderr)
    return out
