"""Recipes: published pruning systems built from the primitives."""

from prunekit.recipes.accuracy_predictor import accuracy_predictor
from prunekit.recipes.lorashear import lorashear
from prunekit.recipes.one_shot import hywia, llm_pruner, sparsellm

__all__ = ["accuracy_predictor", "hywia", "llm_pruner", "lorashear", "sparsellm"]
