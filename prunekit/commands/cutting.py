"""`prunekit prune`: a checkpoint becomes a smaller one."""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.commands.accounting import held_out_windows, tell
from prunekit.commands.choosing import (
    DRAWN,
    calibrate,
    calibrate_streaming,
    choose_importance,
    default_compensation,
    fit_windows,
    load_for,
    make_plan,
    notes,
    planning,
)
from prunekit.commands.options import (
    Parser,
    add_command,
    add_json,
    add_model,
    listed,
    need_tokenizer,
    number,
    print_json,
    text_table,
)
from prunekit.errors import PrunekitError
from prunekit.files import check_new_folder

if TYPE_CHECKING:
    from prunekit.account import LossChange
    from prunekit.pruning import PruningPlan

TEXT = """\
Scores every unit (attention heads, channels of the feed-forward layers), removes
the least important ones, and saves what is left to OUT, with the plan in
plan.json and a model card in README.md. OUT is complete or not there.

A checkpoint that is bigger than the free memory is streamed: its weights stay on
disk, and what is finished stays in .OUT.partial, so that the same command goes on
after an interrupt. Importances that need gradients cannot be had that way.

The default, curvature with a re-fit, was chosen on two real models; it takes about two
minutes for one of 135M parameters on two cores.

example:
  prunekit prune world --pruning-ratio 0.25 --out small/
  prunekit prune path/to/checkpoint --pruning-ratio 0.2 --calibration text.txt --out small/
  prunekit prune path/to/checkpoint --pruning-ratio 0.2 --importance taylor \\
      --calibration text.txt --compensate none --out small/
  prunekit prune path/to/checkpoint --plan plan.json --out small/
  prunekit prune path/to/large --pruning-ratio 0.2 --importance l2 --streaming --out small/"""
PLANNING = (
    "pruning_ratio",
    "importance",
    "granularity",
    "calibration",
    "ranking",
    "normalize",
    "steps",
    "of",
    "kinds",
    "protect_layers",
    "round_to",
    *DRAWN,
)

NAMES = (
    "curvature, "
    "taylor, taylor-vector, taylor-second, taylor-mixed, hywia, activation, fluctuation, reconstruction, ablation, "
    "block-influence, l1, l2 or random"
)
UNMEASURED = "weights stay on disk, so the loss before and after is not measured; afterwards see prunekit evaluate"
PADDED = "prunekit export --layout padded"
OF = "what the ratio counts: parameters (default; widths may differ a little between layers) or units (the same in all)"


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "prune", run, "Remove the least important units of a model.", TEXT)
    add_model(parser)
    parser.add_argument("--out", required=True, help="folder to write; it may not exist yet")
    parser.add_argument(
        "--pruning-ratio", type=number(float, 0, 1, below=True), help="fraction of all parameters to remove, below 1"
    )
    parser.add_argument("--plan", metavar="PLAN.json", help="cut by this plan; nothing is scored")
    _add_scoring(parser)
    _add_planning(parser)
    _add_compensation(parser)
    _add_writing(parser)
    add_json(parser)


def _add_scoring(parser: Parser) -> None:
    group = parser.add_argument_group("what is important")
    group.add_argument(
        "--importance", help=f"{NAMES} (default: curvature; taylor for other kinds than heads and channels)"
    )
    group.add_argument("--granularity", help="of taylor: element (default) or vector")
    group.add_argument(
        "--calibration",
        metavar="TEXT",
        help='text file for all but l1, l2 and random, or "world" (the default where MODEL is world); '
        "windows of it that no score saw tell what the cut did",
    )
    group.add_argument("--n-samples", type=number(int, 1), help=f"windows of that text (default: {DRAWN['n_samples']})")
    group.add_argument("--seq-len", type=number(int, 2), help=f"tokens a window (default: {DRAWN['seq_len']})")
    group.add_argument("--seed", type=int, help=f"draws the windows, or random scores (default: {DRAWN['seed']})")


def _add_planning(parser: Parser) -> None:
    group = parser.add_argument_group("what may go")
    group.add_argument(
        "--ranking", help="local: every group loses the same share; global: all compete (default with curvature)"
    )
    group.add_argument(
        "--normalize", choices=("loss",), help="loss, for global: scores scaled to what the loss really does"
    )
    group.add_argument("--steps", type=number(int, 1), help="cut in so many steps, scored anew after each (default: 1)")
    group.add_argument("--of", help=OF)
    kinds = "kinds of groups, with commas (default: kv_head,ffn_channel; query_head where attention has one KV head)"
    group.add_argument("--kinds", type=listed(), help=kinds)
    group.add_argument("--protect-layers", type=listed(number(int, 0)), metavar="0,4", help="layers that stay whole")
    group.add_argument("--round-to", type=number(int, 1), help="keep multiples of this many units (default: 1)")


def _add_compensation(parser: Parser) -> None:
    group = parser.add_argument_group("what is left")
    group.add_argument(
        "--compensate",
        nargs="?",
        const="weights",
        choices=("weights", "bias", "both", "none"),
        help="re-fit the layers that consume pruned units on the calibration text: their weights (the default of the "
        "option, and without it where the importance is the default one), their biases, both, or none",
    )


def _add_writing(parser: Parser) -> None:
    group = parser.add_argument_group("large checkpoints")
    group.add_argument(
        "--streaming",
        action=argparse.BooleanOptionalAction,
        help="leave the weights on disk (default: where they take more than the free memory)",
    )
    group.add_argument("--max-shard-size", metavar="SIZE", help="of the files written, such as 1GB")


def run(args: argparse.Namespace) -> int:
    """Load, score, plan, prune, save, print."""
    began = time.monotonic()
    check_new_folder(args.out)
    check_arguments(args)
    plan = cut(args)
    if args.json:
        print_json({**as_dict(args, plan), "seconds": round(time.monotonic() - began, 1)})
        return 0
    from prunekit.account import LossChange

    print(f"{args.model} → {args.out}\n\n{text_table(plan.summary_rows())}")
    print(f"\n{plan.pruning_ratio:.2%} of the parameters went, in {time.monotonic() - began:.0f} s")
    if "loss" in plan.notes:
        print(LossChange.from_dict(plan.notes["loss"]))
    for line in remarks(args, plan):
        print(line)
    return 0


def remarks(args: argparse.Namespace, plan: "PruningPlan") -> list[str]:
    """What is to be known of the folder written: that tokens have new numbers, that it is not plain."""
    from prunekit.checkpoint.cards import LISTED, RENUMBERED
    from prunekit.checkpoint.folders import read_config
    from prunekit.checkpoint.saving import not_plain

    told = [f"nothing goes of {plan.notes['whole']}"] if "whole" in plan.notes and args.streaming else []
    told += [f"{RENUMBERED} ({LISTED}): no tokenizer is saved"] if plan.takes_tokens else []
    widths = not_plain(read_config(Path(args.out)))
    if widths:
        even = "--of units keeps layers even, " if uneven_by_parameters(args, plan) else ""
        biased = any(width.startswith("bias:") for width in widths)  # which zeros cannot fill up
        advice = "loads with prunekit" if biased else f"loads with prunekit; {even}{PADDED} fills them up"
        told.append(f"not a plain checkpoint ({'; '.join(widths)}): {advice}")
    return told


def uneven_by_parameters(args: argparse.Namespace, plan: "PruningPlan") -> bool:
    """Whether layers differ only because a number of parameters was to be met."""
    asked = args.plan is None and args.of != "units" and args.ranking != "global"
    return asked and bool((plan.table().groupby("kind")["kept"].nunique() > 1).any())


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses a plan together with what makes one, and neither of both, before anything heavy.

    Raises:
        PrunekitError: names the first option too many, or the two of which one is needed.
    """
    read = ("calibration", *DRAWN) if args.calibration is not None else ()  # by the re-fit and the account too
    given = [name for name in PLANNING if getattr(args, name) is not None and name not in read]
    if args.plan is not None and given:
        option = "--" + given[0].replace("_", "-")
        raise PrunekitError(f"--plan says already what goes; leave out {option}, or leave out --plan")
    if args.plan is None and args.pruning_ratio is None:
        raise PrunekitError("how much is to go? give --pruning-ratio, such as 0.2, or --plan PLAN.json")
    if args.calibration is None and args.model == "world":
        args.calibration = "world" if args.compensate or args.normalize else None
    for name in ("compensate", "normalize"):
        if getattr(args, name) not in (None, "none") and args.calibration is None:
            raise PrunekitError(f"--{name} reads text; give --calibration with a text file or 'world'")
    if args.normalize and args.ranking != "global":
        raise PrunekitError("--normalize lets groups compete, which they do with --ranking global alone; give that too")


def cut(args: argparse.Namespace) -> "PruningPlan":
    """Everything from the model to the saved smaller one.

    Raises:
        PrunekitError: whatever is wrong with the model, the plan, the options or the place.
    """
    if streams(args):
        plan = cut_streaming(args)
        print(f"prunekit: {UNMEASURED} {args.out}", file=sys.stderr)
        return plan
    from prunekit.checkpoint import load, save
    from prunekit.pruning import PruningPlan, prune
    from prunekit.pruning.cuts import tokens_went

    args.compensate = default_compensation(args)
    if args.plan is not None:
        plan = PruningPlan.load(args.plan)
        model, tokenizer = load(args.model)
        fit_windows(args, model.config)
        if args.compensate:
            need_tokenizer(args.model, tokenizer, "a calibration text")
    else:
        importance = choose_importance(args)
        model, tokenizer = load_for(args, importance)
        fit_windows(args, model.config)
        plan = make_plan(args, model, tokenizer, importance)
    before = n_parameters(model)
    held_out = held_out_windows(args, tokenizer, seen=bool(args.compensate) or plan.tokens is not None)
    if args.compensate:
        calib = calibrate(args, tokenizer)
        small = prune(model, plan, compensate=calib, fit=args.compensate, held_out=held_out)
    else:
        small = prune(model, plan, inplace=True, held_out=held_out)
    change: LossChange = small.loss_change  # type: ignore[assignment]
    plan = replace(plan, n_parameters=before, n_parameters_kept=n_parameters(small))  # a plan may be written by hand
    measured = {"loss": change.to_dict()} if change.is_measured else {}
    plan = replace(plan, notes={**plan.notes, **notes(args), **measured})
    save(small, args.out, tokenizer=None if tokens_went(small) else tokenizer, plan=plan, **shard_size(args))
    tell(change)
    return plan


def streams(args: argparse.Namespace) -> bool:
    """Whether the weights stay on disk: as told, else where they take more than the free memory; says which."""
    if args.streaming is not None:
        return bool(args.streaming)
    import psutil

    from prunekit.checkpoint.origins import resolve
    from prunekit.checkpoint.stream_source import n_bytes

    source = Path(resolve(args.model))
    if not source.is_dir():
        return False
    size, free = n_bytes(source), psutil.virtual_memory().available
    if size > free:
        sizes = f"{size / 1e9:.1f} GB of weights, {free / 1e9:.1f} GB of free memory"
        print(f"prunekit: {sizes}: streaming; --no-streaming loads them all the same", file=sys.stderr)
    return size > free


def cut_streaming(args: argparse.Namespace) -> "PruningPlan":
    """The same with the weights on disk.

    Raises:
        PrunekitError: as `cut`; also where the model or the importance cannot be streamed.
        KeyboardInterrupt: says where the finished part lies.
    """
    from prunekit.checkpoint.stream_source import local_folder
    from prunekit.checkpoint.streaming import check_streamable, prune_checkpoint
    from prunekit.pruning import PruningPlan

    for name in ("compensate", "normalize", "steps"):
        if getattr(args, name) not in (None, "none"):
            raise PrunekitError(f"--{name} needs the whole model in memory; leave it out, or give --no-streaming")
    local_folder(args.model)
    if args.plan is not None:
        plan = PruningPlan.load(args.plan)
        return prune_checkpoint(args.model, args.out, plan, notes=notes(args), **shard_size(args))
    importance = choose_importance(args)
    check_streamable(importance)
    calib = calibrate_streaming(args) if importance.needs_calibration else None
    options: dict[str, Any] = {"notes": notes(args), **shard_size(args), **planning(args)}
    return prune_checkpoint(args.model, args.out, importance, args.pruning_ratio, calib, **options)


def shard_size(args: argparse.Namespace) -> dict[str, Any]:
    """The option that says how large files may be, where it is given."""
    return {} if args.max_shard_size is None else {"max_shard_size": args.max_shard_size}


def n_parameters(model: Any) -> int:
    """Parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def as_dict(args: argparse.Namespace, plan: "PruningPlan") -> dict[str, Any]:
    """What was done, as plain values."""
    return {
        "model": args.model,
        "out": args.out,
        "n_parameters": plan.n_parameters,
        "n_parameters_kept": plan.n_parameters_kept,
        "pruning_ratio": plan.pruning_ratio,
        "kinds": plan.summary().to_dict("index"),
        "notes": plan.notes,
    }
