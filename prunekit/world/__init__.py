"""The embedded world: a small model, the facts in its training text, and questions about them."""

from prunekit.world.corpus import documents, instructions, validation_text
from prunekit.world.model import DATA, card, is_world_tokenizer, load
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
