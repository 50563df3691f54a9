"""Unstructured and n:m sparsity: solvers for one weight matrix, and `sparsify` for a model."""

from prunekit.sparsity.model_sparsity import sparsify
from prunekit.sparsity.solvers import SparseLLM, magnitude, sparsegpt, wanda
from prunekit.sparsity.sparsity_report import SparsityReport
from prunekit.sparsity.zero_masks import keep_zeros, masked_adapters

__all__ = [
    "SparseLLM",
    "SparsityReport",
    "keep_zeros",
    "magnitude",
    "masked_adapters",
    "sparsegpt",
    "sparsify",
    "wanda",
]
