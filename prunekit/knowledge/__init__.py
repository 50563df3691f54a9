"""What a model no longer knows when a group, or one unit, is zeroed alone; which units write massive activations."""

from prunekit.knowledge.massive import MassiveActivations, massive_activations
from prunekit.knowledge.measuring import knowledge_distribution, knowledge_of_units
from prunekit.knowledge.result import KnowledgeDistribution

__all__ = [
    "KnowledgeDistribution",
    "MassiveActivations",
    "knowledge_distribution",
    "knowledge_of_units",
    "massive_activations",
]
