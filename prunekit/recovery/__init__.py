"""Training after pruning."""

from prunekit.recovery.log import RecoveryLog
from prunekit.recovery.lora import LoRA
from prunekit.recovery.recovering import recover

__all__ = ["LoRA", "RecoveryLog", "recover"]
