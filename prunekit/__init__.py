"""prunekit: learn and do structural pruning of large language models.

The pipe, whole::

    model, tokenizer = load("world")
    groups = discover(model)
    calib = calibration_set("world", tokenizer, n_samples=64, seq_len=128, seed=0)
    scores = score(model, groups.of_kind("kv_head", "ffn_channel"), Curvature(), calib)
    small = prune(model, plan(groups, scores, pruning_ratio=0.25), compensate=calib)
    small = recover(small, LoRA(r=8), "world", tokenizer=tokenizer)
    print(evaluate(small, tokenizer, ["perplexity", "zero_shot", "cost"]))
    save(small, "out/")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prunekit import registration
from prunekit.errors import SEARCH, is_installed

if TYPE_CHECKING:
    from prunekit.account import LossChange
    from prunekit.calibration import calibration_set
    from prunekit.checkpoint import export, load, save
    from prunekit.checkpoint.streaming import prune_checkpoint
    from prunekit.discovery import CoupledGroup, Groups, Member, discover
    from prunekit.errors import DamageWarning, PrunekitError
    from prunekit.evaluation import (
        Report,
        compare,
        compare_accuracy,
        cost,
        evaluate,
        generations,
        perplexity,
        standard_text,
        zero_shot,
    )
    from prunekit.explorer import explore
    from prunekit.importance import (
        REAP,
        Ablation,
        Activation,
        BlockInfluence,
        Curvature,
        Fluctuation,
        HyWIA,
        Magnitude,
        Random,
        Reconstruction,
        RouterFrequency,
        Taylor,
        fuse,
        score,
    )
    from prunekit.knowledge import (
        KnowledgeDistribution,
        ablate,
        ask,
        attention_pattern,
        compare_knowledge,
        exciting_tokens,
        knowledge_distribution,
        knowledge_of_units,
        massive_activations,
        needs,
    )
    from prunekit.pruning import PruningPlan, compensate, plan, plan_in_steps, prune
    from prunekit.recovery import (
        LHSPG,
        Distillation,
        FullTuning,
        LoRA,
        Mixture,
        TeacherLogits,
        keep_logits,
        prune_progressively,
        reconstruct,
        recover,
        recover_on_mixture,
    )
    from prunekit.search import (
        AccuracyPredictor,
        HyperparameterSpace,
        KnobSpace,
        PlanSpace,
        measure_pairs,
        search_space,
    )
    from prunekit.sparsity import SparseLLM, SparsityReport, sparsify

__version__ = "0.1.0"

# Subpackages are imported on first use, so that `prunekit --help` does not wait for torch.
_ROOMS = {
    "account": ("LossChange",),
    "calibration": ("calibration_set",),
    "checkpoint": ("export", "load", "save"),
    "checkpoint.streaming": ("prune_checkpoint",),
    "discovery": ("CoupledGroup", "Groups", "Member", "discover"),
    "errors": ("DamageWarning", "PrunekitError"),
    "evaluation": (
        "Report", "compare", "compare_accuracy", "cost", "evaluate", "generations", "perplexity", "standard_text",
        "zero_shot",
    ),
    "explorer": ("explore",),
    "importance": (
        "Ablation", "Activation", "BlockInfluence", "Curvature", "Fluctuation", "HyWIA", "Magnitude", "REAP",
        "Random", "Reconstruction", "RouterFrequency", "Taylor", "fuse", "score",
    ),
    "knowledge": (
        "KnowledgeDistribution", "ablate", "ask", "attention_pattern", "compare_knowledge", "exciting_tokens",
        "knowledge_distribution", "knowledge_of_units", "massive_activations", "needs",
    ),
    "pruning": ("PruningPlan", "compensate", "plan", "plan_in_steps", "prune"),
    "recovery": (
        "Distillation", "FullTuning", "LHSPG", "LoRA", "Mixture", "TeacherLogits", "keep_logits",
        "prune_progressively", "reconstruct", "recover", "recover_on_mixture",
    ),
    "search": (
        "AccuracyPredictor", "HyperparameterSpace", "PlanSpace", "measure_pairs", "search_space",
        "KnobSpace",  # the old name of HyperparameterSpace
    ),
    "sparsity": ("SparseLLM", "SparsityReport", "sparsify"),
}  # fmt: skip

registration.watch()

_MISSING = () if all(map(is_installed, SEARCH)) else _ROOMS["search"]  # a star import takes what is there
__all__ = sorted(name for names in _ROOMS.values() for name in names if name not in _MISSING)


def __getattr__(name: str) -> Any:
    for room, names in _ROOMS.items():
        if name in names:
            found = getattr(import_module(f"prunekit.{room}"), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module 'prunekit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
