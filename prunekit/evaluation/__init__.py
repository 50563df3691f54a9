"""Evaluation of a model: perplexity, zero-shot accuracy, cost, and reports."""

from prunekit.evaluation.footprint import Cost, Latency, cost
from prunekit.evaluation.language_modelling import (
    Generations,
    PerplexityResult,
    generations,
    measure_perplexity,
    perplexity,
)
from prunekit.evaluation.multiple_choice import ZeroShotResult, zero_shot
from prunekit.evaluation.report import Report, compare, compare_accuracy, evaluate
from prunekit.evaluation.standard_tasks import standard_task
from prunekit.evaluation.windows import standard_text

__all__ = [
    "Cost",
    "Generations",
    "Latency",
    "PerplexityResult",
    "Report",
    "ZeroShotResult",
    "compare",
    "compare_accuracy",
    "cost",
    "evaluate",
    "generations",
    "measure_perplexity",
    "perplexity",
    "standard_task",
    "standard_text",
    "zero_shot",
]
