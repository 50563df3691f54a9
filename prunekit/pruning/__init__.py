"""Plans from scores, and smaller models from plans."""

from prunekit.pruning.compensation import compensate
from prunekit.pruning.planning import plan, plan_in_steps
from prunekit.pruning.plans import PruningPlan
from prunekit.pruning.surgery import prune

__all__ = ["PruningPlan", "compensate", "plan", "plan_in_steps", "prune"]
