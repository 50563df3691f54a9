"""Search for the best plan under a budget, with a predictor of the accuracy after pruning."""

from prunekit.errors import SEARCH, need

need("search", *SEARCH, why="prunekit.search")

from prunekit.search.architectures import PlanSpace
from prunekit.search.campaign import measure_pairs
from prunekit.search.cost_tables import cache_table, check_table, latency_table, mac_table, weight_table
from prunekit.search.costs import Budget, CostTable, parameter_table
from prunekit.search.damages import measure_damages
from prunekit.search.hyperparameters import Choice, Range
from prunekit.search.pairs import Metric, Pairs
from prunekit.search.predictor import AccuracyPredictor, Trees, agreement, cross_validate, learning_curve
from prunekit.search.proposals import known_points, refined
from prunekit.search.search_rounds import Found, search_space
from prunekit.search.solving import solve_budgets, solve_in_steps
from prunekit.search.space import HyperparameterSpace, KnobSpace, Space

__all__ = [
    "AccuracyPredictor",
    "Budget",
    "Choice",
    "CostTable",
    "Found",
    "HyperparameterSpace",
    "KnobSpace",
    "Metric",
    "Pairs",
    "PlanSpace",
    "Range",
    "Space",
    "Trees",
    "agreement",
    "cache_table",
    "check_table",
    "cross_validate",
    "latency_table",
    "known_points",
    "learning_curve",
    "mac_table",
    "measure_damages",
    "measure_pairs",
    "parameter_table",
    "refined",
    "search_space",
    "solve_budgets",
    "solve_in_steps",
    "weight_table",
]
