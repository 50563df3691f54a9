"""Search: which architecture under a budget, by a predictor that learns what pruning costs."""

from prunekit.extras import need

need("search", "joblib", "lightgbm", "optuna", why="prunekit.search")

from prunekit.search.architectures import PlanSpace
from prunekit.search.campaign import measure_pairs
from prunekit.search.costs import Budget, CostTable, parameter_table
from prunekit.search.knobs import Choice, Range
from prunekit.search.metrics import Metric
from prunekit.search.pairs import Pairs
from prunekit.search.predictor import AccuracyPredictor, Trees
from prunekit.search.refining import refined
from prunekit.search.searching import Found, search_space
from prunekit.search.space import KnobSpace, Space
from prunekit.search.starting import known_points
from prunekit.search.tables import check_table, latency_table, mac_table
from prunekit.search.validating import agreement, cross_validate, learning_curve

__all__ = [
    "AccuracyPredictor",
    "Budget",
    "Choice",
    "CostTable",
    "Found",
    "KnobSpace",
    "Metric",
    "Pairs",
    "PlanSpace",
    "Range",
    "Space",
    "Trees",
    "agreement",
    "check_table",
    "cross_validate",
    "latency_table",
    "known_points",
    "learning_curve",
    "mac_table",
    "measure_pairs",
    "parameter_table",
    "refined",
    "search_space",
]
