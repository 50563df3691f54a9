"""Knowledge distribution of a model under ablation of groups or units, and analysis of massive activations."""

from prunekit.knowledge.massive import MassiveActivations, massive_activations
from prunekit.knowledge.measurement import knowledge_distribution, knowledge_of_units
from prunekit.knowledge.result import KnowledgeDistribution

__all__ = [
    "KnowledgeDistribution",
    "MassiveActivations",
    "knowledge_distribution",
    "knowledge_of_units",
    "massive_activations",
]
