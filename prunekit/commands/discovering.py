"""`prunekit discover`: which parts of a model can be cut."""

import argparse
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.commands.options import add_command, add_json, add_model, number, print_json, text_table
from prunekit.errors import PrunekitError
from prunekit.files import new_file

if TYPE_CHECKING:
    from prunekit.discovery import Groups

TEXT = """\
A unit is the smallest thing that can be removed: an attention head with all its
rows and columns, a channel of a feed-forward layer, a whole layer. A coupled
group holds the interchangeable units of one place. Exact groups can be cut so
that the smaller model computes what the full one does with those units at zero.

example:
  prunekit discover world
  prunekit discover path/to/checkpoint --json
  prunekit discover path/to/checkpoint --plot layer.png --layer 3"""
PICTURES = (".png", ".pdf", ".svg")


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "discover", run, "Show which parts of a model can be cut, and what is locked.", TEXT)
    add_model(parser)
    parser.add_argument("--plot", metavar="FILE.png", help="draw one layer's groups, as png, pdf or svg")
    parser.add_argument("--layer", type=number(int, 0), help="which layer to draw (default: the first with groups)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Load, discover, draw, print."""
    from prunekit.discovery import discover

    check_picture(args)
    groups = discover(structure_of(args.model))
    if args.plot is not None:
        draw(groups, args.layer, Path(args.plot))
    if args.json:
        print_json({"model": args.model, **as_dict(groups), **({} if args.plot is None else {"plot": args.plot})})
        return 0
    print(f"{args.model}: {groups.n_parameters:,} parameters\n\n{text_table(kind_rows(groups))}")
    print("\nlocked, so never cut:" if groups.locked else "\nnothing is locked")
    for what, why in groups.locked.items():
        print(f"  {what}: {why}")
    if args.plot is not None:
        print(f"\ndrawn: {args.plot}")
    return 0


def structure_of(source: str) -> Any:
    """The model of a folder without its weights, which discovery does not read; whatever else, loaded.

    A GGUF file stands for the folder that it is converted to.

    Raises:
        PrunekitError: as `load`, which says what is wrong with a checkpoint.
    """
    from prunekit.checkpoint import load
    from prunekit.checkpoint.origins import resolve

    folder = Path(resolve(source))
    if folder.is_dir():
        with suppress(Exception):  # of any kind, from any family; loading tells
            return without_weights(folder)
    return load(source)[0]


def without_weights(folder: Path) -> Any:
    """The model that a configuration leads to, empty, cut as recorded.

    Raises:
        PrunekitError: it does not fit the files, or is not of the class that it names. Whatever else its family raises.
    """
    from transformers import AutoConfig

    from prunekit.checkpoint.building import check_size, cut_again
    from prunekit.checkpoint.folders import read_config, stored_tensors
    from prunekit.checkpoint.loading import LEAST_PART_LEFT, MODEL_TYPE
    from prunekit.discovery import discover
    from prunekit.models import empty_model

    saved, stored = read_config(folder), stored_tensors(folder)
    cut = saved.get("model_type") == MODEL_TYPE
    plain = None if cut else AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config = plain or AutoConfig.for_model(**saved["base_config"])
    check_size(config, stored, str(folder), factor=LEAST_PART_LEFT if cut else 2)
    model = empty_model(config)
    if "prunekit" in saved or type(model).__name__ not in config.architectures:
        raise PrunekitError(f"{str(folder)!r} is not what its configuration says; load it")
    return cut_again(model, discover(model), saved["stages"], saved.get("biases", [])) if cut else model


def check_picture(args: argparse.Namespace) -> None:
    """Refuses a picture that could not be written, and a layer without one, before anything heavy.

    Raises:
        PrunekitError: names the option, and what to give.
    """
    if args.plot is None:
        if args.layer is not None:
            raise PrunekitError(f"--layer {args.layer} says which layer to draw; give --plot FILE.png too")
        return
    if Path(args.plot).suffix not in PICTURES:
        raise PrunekitError(f"--plot {args.plot!r} is no picture; give a name that ends with {', '.join(PICTURES)}")


def draw(groups: "Groups", layer: int | None, path: Path) -> None:
    """One layer's groups as a picture, written beside its place and moved there.

    Raises:
        PrunekitError: it has no groups, or the picture cannot be written.
    """
    import matplotlib

    matplotlib.use("agg")
    from prunekit.plotting import plot_groups

    figure: Any = plot_groups(groups, layer=layer).figure
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as beside:
            figure.savefig(beside, dpi=150)
    except OSError as error:
        raise PrunekitError(f"cannot write {str(path)!r} ({error.strerror}); choose another place") from None


def kind_rows(groups: "Groups") -> list[tuple[object, ...]]:
    """One row a kind: kind, groups, units a group, units in all, exact."""
    rows: list[tuple[object, ...]] = [("kind", "groups", "units a group", "units", "exact")]
    for kind in dict.fromkeys(group.kind for group in groups):
        found = groups.of_kind(kind)
        sizes = sorted({group.n_units for group in found})
        a_group = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        exact = "yes" if all(group.exact for group in found) else "no"
        rows.append((kind, len(found), a_group, sum(group.n_units for group in found), exact))
    return rows


def as_dict(groups: "Groups") -> dict[str, Any]:
    """Everything but the indices, as plain values."""
    found = [
        {
            "name": group.name,
            "kind": group.kind,
            "layer": group.layer,
            "n_units": group.n_units,
            "exact": group.exact,
            "members": [{"parameter": m.parameter, "dim": m.dim, "width": m.width} for m in group.members],
        }
        for group in groups
    ]
    return {"n_parameters": groups.n_parameters, "groups": found, "locked": groups.locked}
