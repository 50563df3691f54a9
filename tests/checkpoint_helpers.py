"""Cut models of every family, and their checkpoints, made once a session."""

import hashlib
import random
from functools import cache
from pathlib import Path

import torch
from families import FAMILIES, logits, plan_keeping, tokens
from safetensors.torch import save_file

import prunekit as pk


def cut(name, uneven, dtype=torch.float32):
    """A model with half of its heads and channels, or with a different number in each layer; adapters merged."""
    model = FAMILIES[name].model(dtype=dtype)
    groups, rng = pk.discover(model), random.Random(0)
    keep = {}
    for g in groups.of_kind("kv_head", "ffn_channel"):
        n = max(1, g.n_units // 2 - (g.layer if uneven else 0))
        keep[g.name] = sorted(rng.sample(range(g.n_units), n))
    small = pk.prune(model, plan_keeping(groups, keep))
    return small.merge_and_unload().eval() if hasattr(small, "merge_and_unload") else small


same_cut = cache(cut)  # for tests that leave it as it is


class Folders:
    """Checkpoints by family and form, each with `expected.safetensors` beside: token ids and their logits."""

    def __init__(self, root: Path):
        self.root = root

    @cache  # noqa: B019 - lives as long as the session
    def __call__(self, name: str, form: str) -> Path:
        """The folder of a family's `"even"`, `"uneven"` or `"padded"` checkpoint, the last in float64."""
        folder = self.root / name / form
        small = same_cut(name, form != "even", torch.float64 if form == "padded" else torch.float32)
        if form == "padded":
            pk.export(small, folder, layout="padded")
        else:
            pk.save(small, folder)
        save_file({"ids": tokens(), "logits": logits(small)}, self.root / name / f"{form}.safetensors")
        return folder


def digest(folder: Path) -> dict[str, str]:
    """Path inside a folder → what stands there: a file's hash, a link's target."""
    found = {}
    for path in sorted(folder.rglob("*")):
        inside = str(path.relative_to(folder))
        if path.is_symlink():
            found[inside] = f"link to {path.readlink()}"
        elif path.is_file():
            found[inside] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[inside] = "folder"
    return found
