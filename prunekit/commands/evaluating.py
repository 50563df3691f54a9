"""`prunekit evaluate`: what models know and cost, side by side."""

import argparse
import sys
from dataclasses import dataclass
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
    from prunekit.questions import Task

TEXT = """\
Measures perplexity on a text (lower is better), accuracy in multiple-choice
questions, and cost (parameters, multiply-accumulates, memory, time). Several
models stand side by side. The model "world" and what was cut from it bring text
and questions of their own.

tasks: boolq, piqa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa,
mmlu, mmlu_<subject>, lambada; any other name is one of lm-evaluation-harness's,
where that is installed. Texts: a file, wikitext2, ptb, c4 or world. Both are read
from --data-dir, else from the hub.

example:
  prunekit evaluate world small/ recovered/
  prunekit evaluate dense/ small/ --data test.txt --metrics perplexity,cost
  prunekit evaluate dense/ --tasks boolq,piqa --limit 200 --data wikitext2 \\
      --data-dir data/
  prunekit evaluate dense/ --data stories.txt --protocol documents \\
      --separator '<|endoftext|>'"""

COMMON = ("perplexity", "macs", "peak_bytes")  # their notes hold for all models alike


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "evaluate", run, "Measure models, side by side.", TEXT)
    add_model(parser, nargs="+")
    parser.add_argument(
        "--data", "--text", metavar="TEXT", help='text for perplexity: a file, wikitext2, ptb, c4 or "world"'
    )
    parser.add_argument("--tasks", type=listed(), help="tasks to answer, with commas: boolq,piqa,mmlu_anatomy")
    parser.add_argument("--limit", type=number(int, 1), help="the first so many questions of each task (default: all)")
    parser.add_argument("--shots", type=number(int, 0), default=0, help="answered examples before each (default: 0)")
    parser.add_argument("--data-dir", metavar="DIR", help="folder with a folder a task or text (default: the hub)")
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
    asked = read_asked(args)
    measured = {name: measure(args, source, asked) for name, source in short_names(args.model).items()}
    reports = {name: report for name, (report, _) in measured.items()}
    without = [
        name
        for name, (report, others) in measured.items()
        if args.metrics is None and report.zero_shot is None and not others
    ]
    if without:
        print(f"no zero_shot for {', '.join(without)}: give --tasks, such as boolq,piqa", file=sys.stderr)
    if args.json:
        print_json({name: as_dict(report) | others for name, (report, others) in measured.items()})
        return 0
    table = compare(reports)
    rows = [(metric, *(readable(value) for value in table[metric])) for metric in table]
    rows += harness_rows([others for _, others in measured.values()])
    print(text_table([("", *reports), *rows]))
    first = next(iter(reports.values()))
    notes = first.table().set_index("metric")["note"]
    print("\n" + "\n".join(f"{metric}: {notes[metric]}" for metric in COMMON if metric in notes))
    print("".join(f"{name}: {report.zero_shot}\n" for name, report in reports.items() if report.zero_shot), end="")
    return 0


@dataclass(frozen=True)
class Asked:
    """What models are asked: text for perplexity, tasks, and names of tasks that only the harness has."""

    text: Any
    tasks: "list[Task] | None"
    harness: tuple[str, ...]


def read_asked(args: argparse.Namespace) -> Asked:
    """Read texts and tasks, once for all models.

    Raises:
        PrunekitError: they cannot be read; a task is unknown, or needs the harness, which is not installed.
    """
    from prunekit.evaluation.harness import import_harness
    from prunekit.evaluation.named_tasks import named_tasks
    from prunekit.evaluation.standard_tasks import is_standard
    from prunekit.evaluation.standard_texts import TEXTS, standard_text

    names = args.tasks or ()
    ours, others = [n for n in names if is_standard(n)], tuple(n for n in names if not is_standard(n))
    if others:
        import_harness(f"{', '.join(map(repr, others))}: no task of prunekit's own. ")
    options = {"limit": args.limit, "data_dir": args.data_dir, "shots": args.shots}
    text = standard_text(args.data, data_dir=args.data_dir) if args.data in TEXTS else args.data
    return Asked(text, named_tasks(ours, **options) if ours else None, others)


def harness_rows(found: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One row a task and metric of the harness's."""
    keys = dict.fromkeys((task, metric) for tasks in found for task, metrics in tasks.items() for metric in metrics)
    return [(f"{task} {metric}", *(str(tasks[task][metric]) for tasks in found)) for task, metric in keys]


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


def measure(args: argparse.Namespace, source: str, asked: Asked) -> "tuple[Report, dict[str, Any]]":
    """One model's report, and what the harness says: task → metric → value."""
    from prunekit.evaluation import evaluate
    from prunekit.evaluation.harness import run_harness
    from prunekit.world import is_world_tokenizer

    model, tokenizer = load_with_tokenizer(source, "evaluation")
    metrics = choose_metrics(args, source, asked, is_world_tokenizer(tokenizer))
    options = {name: getattr(args, name) for name in ("window", "stride", "protocol", "separator")}
    harness = {"limit": args.limit, "shots": args.shots or None}
    said = run_harness(model, tokenizer, asked.harness, **harness).headline() if asked.harness else {}
    return evaluate(model, tokenizer, metrics, text=asked.text, tasks=asked.tasks, perplexity_options=options), said


def choose_metrics(args: argparse.Namespace, source: str, asked: Asked, of_world: bool) -> tuple[str, ...]:
    """What is measured: what was asked for, else all that the model and what was given allow.

    Raises:
        PrunekitError: a metric needs what was not given.
    """
    if args.metrics is None:
        able = {"perplexity": of_world or asked.text is not None, "zero_shot": of_world or asked.tasks is not None}
        if args.tasks is None and not able["perplexity"]:
            raise PrunekitError(
                f"{source!r} brings no text of its own; give --data with a text file, --tasks, or other --metrics"
            )
        return tuple(name for name in ("perplexity", "zero_shot", "cost") if able.get(name, True))
    if "perplexity" in args.metrics and asked.text is None and not of_world:
        raise PrunekitError(f"{source!r} brings no text of its own; give --data with a text file, or other --metrics")
    if "zero_shot" in args.metrics and asked.tasks is None and not of_world:
        raise PrunekitError(
            f"zero_shot asks in the world's own words, and {source!r} was not made from the world; give --tasks, such "
            "as boolq,piqa, or leave zero_shot out of --metrics"
        )
    return args.metrics


def as_dict(report: "Report") -> dict[str, Any]:
    """The headline figures, and how perplexity was measured."""
    protocol = report.perplexity and {**report.perplexity.to_dict(), "description": report.perplexity.description}
    return {**report.headline(), "protocol": protocol}
