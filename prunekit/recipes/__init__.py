"""Recipes: published pruning systems built from the primitives, one per module."""

from prunekit.recipes.accuracy_predictor import accuracy_predictor
from prunekit.recipes.hywia import hywia
from prunekit.recipes.llm_pruner import llm_pruner
from prunekit.recipes.lorashear import lorashear
from prunekit.recipes.sparsellm import sparsellm

__all__ = ["accuracy_predictor", "hywia", "llm_pruner", "lorashear", "sparsellm"]
