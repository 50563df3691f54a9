"""`prunekit export`: a checkpoint in a form that other programs load."""

import argparse
from pathlib import Path
from typing import Any

from prunekit.commands.options import add_command, add_json, add_model, print_json, text_table
from prunekit.files import check_new_folder
from prunekit.layouts import LAYOUTS

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
    from prunekit.checkpoint import export, load
    from prunekit.pruning import PruningPlan

    check_new_folder(args.out)
    model, tokenizer = load(args.model)
    cut_by = Path(args.model) / "plan.json"
    options: dict[str, Any] = {"plan": PruningPlan.load(cut_by)} if cut_by.is_file() else {}
    options |= {} if args.max_shard_size is None else {"max_shard_size": args.max_shard_size}
    out = export(model, args.out, layout=args.layout, tokenizer=tokenizer, **options)
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    if args.json:
        print_json({"model": args.model, "out": args.out, "layout": args.layout, "files": files})
        return 0
    print(f"{args.model} → {args.out}, {args.layout}\n")
    print(text_table([("", "bytes"), *((name, f"{size:,}") for name, size in files.items())]))
    return 0
