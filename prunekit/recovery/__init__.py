"""Recovery: training after pruning, and progressive pruning during training."""

from prunekit.recovery.block_reconstruction import reconstruct
from prunekit.recovery.distillation import Distillation
from prunekit.recovery.fine_tuning import recover
from prunekit.recovery.lhspg import LHSPG, importance_saliency, update_saliency
from prunekit.recovery.log import RecoveryLog
from prunekit.recovery.lora import LoRA
from prunekit.recovery.mixture import Mixture, MixtureLog, recover_on_mixture
from prunekit.recovery.progressive import Progressed, prune_progressively
from prunekit.recovery.settings import FullTuning
from prunekit.recovery.teacher_logits import TeacherLogits, keep_logits

__all__ = [
    "Distillation",
    "FullTuning",
    "LHSPG",
    "LoRA",
    "Mixture",
    "MixtureLog",
    "Progressed",
    "RecoveryLog",
    "TeacherLogits",
    "importance_saliency",
    "keep_logits",
    "prune_progressively",
    "reconstruct",
    "recover",
    "recover_on_mixture",
    "update_saliency",
]
