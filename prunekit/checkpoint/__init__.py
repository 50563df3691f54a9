"""Loads, saves and exports checkpoints, without pickles."""

from prunekit.checkpoint.exporting import export
from prunekit.checkpoint.loading import load
from prunekit.checkpoint.saving import save

__all__ = ["export", "load", "save"]
