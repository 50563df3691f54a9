"""Zeros in unchanged shapes: solvers for one weight, and SparseLLM and its peers over a model."""

from prunekit.sparsity.alternation import SparseLLM
from prunekit.sparsity.report import SparsityReport
from prunekit.sparsity.solvers import magnitude, sparsegpt, wanda
from prunekit.sparsity.sparsifying import sparsify

__all__ = ["SparseLLM", "SparsityReport", "magnitude", "sparsegpt", "sparsify", "wanda"]
