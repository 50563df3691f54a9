"""From scores to a plan, from a plan to a smaller model."""

from prunekit.pruning.planning import plan
from prunekit.pruning.plans import PruningPlan
from prunekit.pruning.surgery import prune

__all__ = ["PruningPlan", "plan", "prune"]
