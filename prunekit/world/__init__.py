"""The embedded world: a small model, the facts in its training text, and questions about them.

torch and transformers are imported where they are used: code that needs only documents or questions does not wait for
them.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from prunekit.world.corpus import documents, instructions, validation_text
from prunekit.world.tables import Fact, facts
from prunekit.world.tasks import tasks

__all__ = [
    "DATA",
    "Fact",
    "card",
    "documents",
    "facts",
    "instructions",
    "is_world_tokenizer",
    "load",
    "tasks",
    "validation_text",
]

DATA = Path(__file__).parent / "data"


def load() -> tuple[Any, Any]:
    """The trained model of the embedded world.

    Returns:
        The model, a `LlamaForCausalLM` in float32 and in evaluation mode, and its tokenizer.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from prunekit.checks import PROCESS

    with PROCESS:
        model = AutoModelForCausalLM.from_pretrained(DATA, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(DATA)


@cache
def _words() -> dict[str, int]:
    words: dict[str, int] = json.loads((DATA / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    return words


def is_world_tokenizer(tokenizer: Any) -> bool:
    """Whether a tokenizer is the one of this world: the same words under the same numbers."""
    get_vocab = getattr(tokenizer, "get_vocab", None)
    return get_vocab is not None and get_vocab() == _words()


def card() -> str:
    """The model card: training data, training time and scores."""
    return (DATA / "README.md").read_text(encoding="utf-8")
