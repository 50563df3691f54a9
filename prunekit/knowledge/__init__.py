"""What a model no longer knows when a group, or one unit, is silenced alone."""

from prunekit.knowledge.measuring import knowledge_distribution, knowledge_of_units
from prunekit.knowledge.result import KnowledgeDistribution

__all__ = ["KnowledgeDistribution", "knowledge_distribution", "knowledge_of_units"]
