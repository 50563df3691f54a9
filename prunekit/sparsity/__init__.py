"""Zeros in unchanged shapes: solvers for one weight, and SparseLLM and its peers over a model."""

from prunekit.sparsity.keeping import keep_zeros, masked_adapters
from prunekit.sparsity.methods import SparseLLM
from prunekit.sparsity.report import SparsityReport
from prunekit.sparsity.solvers import magnitude, sparsegpt, wanda
from prunekit.sparsity.sparsifying import sparsify

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
