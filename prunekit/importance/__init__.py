"""Importance scores: one per unit, from weights, gradients or activations."""

from prunekit.importance.ablation import Ablation, ablated
from prunekit.importance.activation import Activation, BlockInfluence, Fluctuation
from prunekit.importance.curvature import Curvature
from prunekit.importance.fusion import FusedScores, HyWIA, fuse
from prunekit.importance.reconstruction import Reconstruction
from prunekit.importance.routing import REAP, RouterFrequency
from prunekit.importance.scores import Scores
from prunekit.importance.scoring import IMPORTANCES, Importance, default_importance, importance_from_name, score
from prunekit.importance.taylor import Magnitude, Random, Taylor

__all__ = [
    "IMPORTANCES",
    "REAP",
    "Ablation",
    "Activation",
    "BlockInfluence",
    "Curvature",
    "Fluctuation",
    "FusedScores",
    "HyWIA",
    "Importance",
    "Magnitude",
    "Random",
    "Reconstruction",
    "RouterFrequency",
    "Scores",
    "Taylor",
    "default_importance",
    "fuse",
    "importance_from_name",
    "score",
    "ablated",
]
