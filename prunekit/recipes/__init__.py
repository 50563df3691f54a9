"""Recipes: published pruning systems built from the primitives."""

from prunekit.recipes.in_rounds import accuracy_predictor, lorashear
from prunekit.recipes.one_shot import hywia, llm_pruner, sparsellm

__all__ = ["accuracy_predictor", "hywia", "llm_pruner", "lorashear", "sparsellm"]
