"""Recipes: one published system a page, made of the primitives."""

from prunekit.recipes.accuracy_predictor import accuracy_predictor
from prunekit.recipes.hywia import hywia
from prunekit.recipes.llm_pruner import llm_pruner
from prunekit.recipes.lorashear import lorashear
from prunekit.recipes.sparsellm import sparsellm

__all__ = ["accuracy_predictor", "hywia", "llm_pruner", "lorashear", "sparsellm"]
