"""Checkpoints: loading and saving, without pickles."""

from prunekit.checkpoint.loading import load
from prunekit.checkpoint.saving import save

__all__ = ["load", "save"]
