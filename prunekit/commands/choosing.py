"""From the options of `prunekit prune` to an importance, a calibration set and a plan."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from prunekit.commands.options import load_with_tokenizer, need_tokenizer
from prunekit.errors import PrunekitError

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.importance import Importance
    from prunekit.pruning import PruningPlan

DRAWN = {"n_samples": 64, "seq_len": 128, "seed": 0}  # unless told otherwise
DEFAULT, ELSE = "curvature", "taylor"  # importances, unless told otherwise; the second where the first does not apply
CURVED_KINDS = {"kv_head", "query_head", "ffn_channel"}


def drawn(args: argparse.Namespace) -> dict[str, int]:
    """How calibration windows are drawn."""
    return {name: default if getattr(args, name) is None else getattr(args, name) for name, default in DRAWN.items()}


def choose_importance(args: argparse.Namespace) -> "Importance":
    """The importance that the options name.

    Raises:
        PrunekitError: there is none of that name, or it has no granularity.
    """
    from prunekit.importance import importance_from_name

    name = args.importance or default_importance(args)
    options = {} if args.granularity is None else {"granularity": args.granularity}
    if name == "random":
        options["seed"] = drawn(args)["seed"]
    return importance_from_name(name, **options)


def fit_windows(args: argparse.Namespace, config: Any) -> None:
    """Where no length of windows is given and the model takes fewer tokens than the default, as many as it takes."""
    from prunekit.models import positions_of

    limit = positions_of(config)
    if args.seq_len is None and limit is not None and 2 <= limit < DRAWN["seq_len"]:
        args.seq_len = limit


def default_importance(args: argparse.Namespace) -> str:
    """The importance where none is named: curvature for heads and FFN channels, Taylor for other kinds."""
    curved = args.granularity is None and set(args.kinds or ()) <= CURVED_KINDS
    return DEFAULT if curved else ELSE


def default_compensation(args: argparse.Namespace) -> str | None:
    """What is re-fitted: what the options say, else weights where the importance is the default one."""
    if args.compensate is not None:
        return None if args.compensate == "none" else args.compensate
    by_default = args.plan is None and args.importance is None and default_importance(args) == DEFAULT
    return "weights" if by_default and not args.normalize else None


def load_for(args: argparse.Namespace, importance: "Importance") -> tuple[Any, Any]:
    """The model, and its tokenizer where the importance reads text.

    Raises:
        PrunekitError: as `load`, there is no text or no tokenizer to read it with, or no model has such kinds.
    """
    from prunekit.checkpoint import load
    from prunekit.pruning.planning import check_options

    check_options(args.pruning_ratio, **planning(args))
    if not importance.needs_calibration and not args.normalize and not args.compensate:
        return load(args.model)
    check_calibration(args)
    return load_with_tokenizer(args.model, "a calibration text")


def check_calibration(args: argparse.Namespace) -> None:
    """Refuses an importance that reads text where none is given; the embedded model has its own.

    Raises:
        PrunekitError: says what to give, and which importances read none.
    """
    if args.calibration is None and args.model == "world":
        args.calibration = "world"
    if args.calibration is None:
        name = args.importance or default_importance(args)
        raise PrunekitError(
            f"importance {name!r} reads text; give --calibration with a text file or 'world', or take an importance "
            "that reads none: l1, l2 or random"
        )


def make_plan(args: argparse.Namespace, model: Any, tokenizer: Any, importance: "Importance") -> "PruningPlan":
    """Discover, score, plan.

    Raises:
        PrunekitError: options that do not fit the model, or a ratio that cannot be met.
    """
    from prunekit.checkpoint.streaming import candidates
    from prunekit.discovery import discover
    from prunekit.importance import Curvature, importance_from_name, score
    from prunekit.importance.curvature import applies
    from prunekit.pruning import plan, plan_in_steps

    calib = calibrate(args, tokenizer) if importance.needs_calibration or args.normalize else None
    groups = discover(model)
    chosen = candidates(groups, args.kinds)
    if args.importance is None and importance == Curvature() and not applies(model, chosen):
        print(f"prunekit: some groups have no linear layer that reads them: scored by {ELSE}", file=sys.stderr)
        importance = importance_from_name(ELSE)
    if args.steps:
        options = planning(args) | {"n_steps": args.steps, "normalize": args.normalize}
        made = plan_in_steps(model, importance, args.pruning_ratio, calib, **options)
    else:
        scores = score(model, chosen, importance, calib, normalize=args.normalize)
        made = plan(groups, scores, args.pruning_ratio, **planning(args))
    if "whole" in made.notes:
        print(f"prunekit: nothing goes of {made.notes['whole']}", file=sys.stderr)
    return made


def planning(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `plan` that are given."""
    options = ("of", "ranking", "kinds", "protect_layers", "round_to")
    return {name: getattr(args, name) for name in options if getattr(args, name) is not None}


def calibrate(args: argparse.Namespace, tokenizer: Any) -> "Tensor":
    """The calibration set of the options."""
    from prunekit.calibration import calibration_set

    windows: dict[str, Any] = dict(drawn(args))
    return calibration_set(args.calibration, tokenizer, **windows)


def calibrate_streaming(args: argparse.Namespace) -> "Tensor":
    """The calibration set of the options; of the checkpoint only its tokenizer is read.

    Raises:
        PrunekitError: there is no text, or no tokenizer to read it with.
    """
    from transformers import AutoConfig

    from prunekit.checkpoint.loading import load_tokenizer
    from prunekit.checkpoint.stream_source import local_folder

    check_calibration(args)
    folder = local_folder(args.model)
    fit_windows(args, AutoConfig.from_pretrained(folder, trust_remote_code=False))
    tokenizer = load_tokenizer(str(folder), False)
    return calibrate(args, need_tokenizer(args.model, tokenizer, "a calibration text"))


def notes(args: argparse.Namespace) -> dict[str, str]:
    """Where the model and its scores come from, for the plan and the model card."""
    told = {"made from": str(args.model)}
    reads = args.compensate or args.normalize or (args.plan is None and choose_importance(args).needs_calibration)
    if args.compensate:
        told["compensate"] = f"{args.compensate}, where a linear layer lost inputs"
    if args.calibration is not None and reads:
        told["calibration"] = "{n_samples} windows of {seq_len} tokens, seed {seed}".format(**drawn(args))
    return told
