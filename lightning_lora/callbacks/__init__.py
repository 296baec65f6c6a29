"""Lightning callbacks; each works without arguments."""

from .adapter_checkpoint import AdapterCheckpoint
from .checkpoint_guard import CheckpointGuard
from .guard import LoRAGuard
from .lora import LoRA
from .merge import MergeOnFitEnd
from .progress import LoRAProgressBar

__all__ = ["AdapterCheckpoint", "CheckpointGuard", "LoRA", "LoRAGuard", "LoRAProgressBar", "MergeOnFitEnd"]
