"""`prunekit evaluate`: what models know and cost, side by side."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from prunekit.evaluation import Report

TEXT = """\
Measures perplexity on a text (lower is better), accuracy in multiple-choice
questions, and cost (parameters, multiply-accumulates, memory, time). Several
models stand side by side. The model "world" and what was cut from it bring text
and questions of their own.

example:
  prunekit evaluate world small/ recovered/
  prunekit evaluate dense/ small/ --data test.txt --metrics perplexity,cost
  prunekit evaluate dense/ --data stories.txt --protocol documents \\
      --separator '<|endoftext|>'"""

COMMON = ("perplexity", "macs", "peak_bytes")  # their notes hold for all models alike


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "evaluate", run, "Measure models, side by side.", TEXT)
    add_model(parser, nargs="+")
    parser.add_argument("--data", "--text", metavar="TEXT", help='text file for perplexity, or "world"')
    parser.add_argument(
        "--metrics", type=listed(), help="with commas: perplexity, zero_shot, cost (default: all that the model allows)"
    )
    parser.add_argument(
        "--protocol", default="windows", help="windows over the whole text (default), documents, or papers (no BOS)"
    )
    parser.add_argument(
        "--window", type=number(int, 2), help="tokens a window, with BOS (default: 128; documents: all the model takes)"
    )
    parser.add_argument("--stride", type=number(int, 1), help="tokens by which windows advance (default: no overlap)")
    parser.add_argument("--separator", help="marker between documents, such as '<|endoftext|>'; with documents only")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure each model, print them side by side."""
    from prunekit.evaluation import compare
    from prunekit.evaluation.report import check_metrics, readable

    if args.metrics is not None:
        check_metrics(args.metrics)
    reports = {name: measure(args, source) for name, source in short_names(args.model).items()}
    without = [name for name, report in reports.items() if args.metrics is None and report.zero_shot is None]
    if without:
        print(f"no zero_shot for {', '.join(without)}: its questions are in the world's own words", file=sys.stderr)
    if args.json:
        print_json({name: as_dict(report) for name, report in reports.items()})
        return 0
    table = compare(reports)
    rows = [(metric, *(readable(value) for value in table[metric])) for metric in table]
    print(text_table([("", *reports), *rows]))
    first = next(iter(reports.values()))
    notes = first.table().set_index("metric")["note"]
    print("\n" + "\n".join(f"{metric}: {notes[metric]}" for metric in COMMON if metric in notes))
    return 0


def short_names(sources: list[str]) -> dict[str, str]:
    """A name for the table → the model: the last part of its path where that tells them apart.

    Raises:
        PrunekitError: the same model twice.
    """
    if len(set(sources)) < len(sources):
        twice = next(source for source in sources if sources.count(source) > 1)
        raise PrunekitError(f"{twice!r} is named twice; name each model once")
    short = [Path(source).name or source for source in sources]
    return dict(zip(short if len(set(short)) == len(short) else sources, sources, strict=True))


def measure(args: argparse.Namespace, source: str) -> "Report":
    """One model's report."""
    from prunekit.evaluation import evaluate
    from prunekit.world import is_world_tokenizer

    model, tokenizer = load_with_tokenizer(source, "evaluation")
    of_world = is_world_tokenizer(tokenizer)
    metrics = args.metrics or ("perplexity", "zero_shot", "cost")
    if not of_world and args.metrics is None:
        metrics = ("perplexity", "cost")
    if "perplexity" in metrics and args.data is None and not of_world:
        raise PrunekitError(f"{source!r} brings no text of its own; give --data with a text file, or other --metrics")
    if "zero_shot" in metrics and not of_world:
        raise PrunekitError(
            f"zero_shot asks in the world's own words, and {source!r} was not made from the world; leave zero_shot out "
            "of --metrics, or ask questions of your own in Python: evaluate(…, tasks=…)"
        )
    options = {name: getattr(args, name) for name in ("window", "stride", "protocol", "separator")}
    return evaluate(model, tokenizer, metrics, text=args.data, perplexity_options=options)


def as_dict(report: "Report") -> dict[str, Any]:
    """The headline figures, and how perplexity was measured."""
    protocol = report.perplexity and {**report.perplexity.to_dict(), "description": report.perplexity.description}
    return {**report.headline(), "protocol": protocol}
