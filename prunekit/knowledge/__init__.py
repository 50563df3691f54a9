"""Knowledge of a model: its distribution under ablation, what one question needs, and what heads and channels do."""

from prunekit.knowledge.ablation_sets import ablate
from prunekit.knowledge.asking import Answers, ask, attention_pattern, side_by_side_answers
from prunekit.knowledge.comparison import compare_knowledge, domain_needs
from prunekit.knowledge.exciting import ExcitingTokens, exciting_tokens
from prunekit.knowledge.massive import MassiveActivations, massive_activations
from prunekit.knowledge.measurement import knowledge_distribution, knowledge_of_units
from prunekit.knowledge.question_needs import needs
from prunekit.knowledge.result import KnowledgeDistribution

__all__ = [
    "Answers",
    "ExcitingTokens",
    "KnowledgeDistribution",
    "MassiveActivations",
    "ablate",
    "ask",
    "attention_pattern",
    "compare_knowledge",
    "domain_needs",
    "exciting_tokens",
    "knowledge_distribution",
    "knowledge_of_units",
    "massive_activations",
    "needs",
    "side_by_side_answers",
]
