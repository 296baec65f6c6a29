"""Lightning callbacks. All of them except `AdaptiveAccumulation` work without arguments.

LoRA: `lora`, `guard` with `layer_calls`, `adapter_checkpoint`, `adapter_ema`, `merge_on_fit_end`. Room for what is
learnt: `capacity_monitor`, `rank_growth`. Rows of an optimizer step: `batch_size_monitor`, `adaptive_accumulation`,
`target_batch_size`. Faults of training: `checkpoint_guard`, `finite_gradients` with `finite`. Memory of a step:
`memory`. Faults of processes and files: `process`. Speed: `tf32`. Display: `progress`, `planned_run`. What they read of
the device, together: `one_reading`.
"""

from .adapter_checkpoint import AdapterCheckpoint
from .adapter_ema import AdapterEMA
from .adaptive_accumulation import AdaptiveAccumulation
from .batch_size_monitor import BatchSizeMonitor
from .capacity_monitor import CapacityMonitor
from .checkpoint_guard import CheckpointGuard
from .finite_gradients import FiniteGradients
from .guard import LoRAGuard
from .lora import LoRA
from .memory.memory_advice import MemoryAdvice
from .memory.memory_choice import MemoryChoice
from .merge_on_fit_end import MergeOnFitEnd
from .planned_run import PlannedRun
from .process.graceful_stop import GracefulStop
from .process.rank_watch import RankWatch
from .process.run_lock import RunLock
from .process.steady_loggers import SteadyLoggers
from .progress import LoRAProgressBar
from .rank_growth import RankGrowth
from .target_batch_size import TargetBatchSize
from .tf32 import TF32

__all__ = [
    "TF32",
    "AdapterCheckpoint",
    "AdapterEMA",
    "AdaptiveAccumulation",
    "BatchSizeMonitor",
    "CapacityMonitor",
    "CheckpointGuard",
    "FiniteGradients",
    "GracefulStop",
    "LoRA",
    "LoRAGuard",
    "LoRAProgressBar",
    "MemoryAdvice",
    "MemoryChoice",
    "MergeOnFitEnd",
    "PlannedRun",
    "RankGrowth",
    "RankWatch",
    "RunLock",
    "SteadyLoggers",
    "TargetBatchSize",
]
