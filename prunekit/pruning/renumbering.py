"""Two forms of a record with removed layers: without these layers, or with their removal as the last stage."""

import re
from typing import Any

from prunekit.pruning.dropping import layer_lists
from prunekit.pruning.recording import Stages


def without_layers(stages: Stages) -> Stages:
    """The record for a model without the removed layers."""
    done: Stages = []
    for stage in stages:
        gone = _gone(stage)
        done = [_moved_up(earlier, gone) for earlier in [*done, stage]]
    return [stage for stage in done if stage]


def _moved_up(stage: dict[str, list[int]], gone: set[str]) -> dict[str, list[int]]:
    """A stage's groups under the names they have once these layers are out."""
    moved = {}
    for name, units in stage.items():
        found = next((match for match in re.finditer(r"\.(\d+)(?=[.:])", name) if _is_layer(name, match, gone)), None)
        if found is None:
            moved[name] = units
        elif name[: found.end()] not in gone:
            before = sum(f"{name[: found.start()]}.{i}" in gone for i in range(int(found[1])))
            moved[f"{name[: found.start()]}.{int(found[1]) - before}{name[found.end() :]}"] = units
    return moved


def _is_layer(name: str, match: re.Match[str], gone: set[str]) -> bool:
    return name[: match.start()] in {layer.rpartition(".")[0] for layer in gone}


def drops_layers(stages: Stages) -> bool:
    """Whether whole layers were removed."""
    return any(_gone(stage) for stage in stages)


def _gone(stage: dict[str, list[int]]) -> set[str]:
    """Paths of the layers removed in a stage."""
    return {name.removesuffix(":layer") for name, units in stage.items() if name.endswith(":layer") and not units}


def on_all_layers(config: Any, stages: Stages) -> Stages:
    """The record with the names of the full model; removed layers are removed last.

    Args:
        config: of the cut model; it is given its layers back.
        stages: group name → units kept, cut after cut.
    """
    n_gone = sum(len(_gone(stage)) for stage in stages)
    config = config.get_text_config()
    here = list(range(config.num_hidden_layers + n_gone))  # numbers of the layers that are there at a stage
    (path,) = {layer.rpartition(".")[0] for stage in stages for layer in _gone(stage)}
    done: Stages = []
    for stage in stages:
        done.append({_numbered(name, path, here): units for name, units in stage.items()})
        here = [number for number in here if f"{path}.{number}" not in _gone(done[-1])]
    gone = sorted(set(range(config.num_hidden_layers + n_gone)) - set(here))
    _lengthen(config, gone)
    inside = re.compile(rf"{re.escape(path)}\.({'|'.join(map(str, gone))})[.:]")
    cuts = [{name: units for name, units in stage.items() if not inside.match(name)} for stage in done]
    return [*filter(None, cuts), {f"{path}.{number}:layer": [] for number in gone}]


def _numbered(name: str, path: str, here: list[int]) -> str:
    """A group's name with the layer number of the full model."""
    return re.sub(rf"^({re.escape(path)}\.)(\d+)(?=[.:])", lambda match: f"{match[1]}{here[int(match[2])]}", name)


def _lengthen(config: Any, gone: list[int]) -> None:
    """Restore the removed layers of a configuration.

    What it lists layer by layer says nothing of those that went; they take after a neighbour, and go again.
    """
    for name, value in list(layer_lists(config, config.num_hidden_layers)):
        longer = list(value)
        for number in gone:
            longer.insert(number, longer[min(number, len(longer) - 1)])
        vars(config)[name] = type(value)(longer)
    config.num_hidden_layers += len(gone)
