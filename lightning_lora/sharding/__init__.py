"""Models on several devices: what each strategy shards, and how adapters are sharded with it.

Read in this order: `shard` (FSDP2 for an adapted module), `fsdp2` (the strategy for it), `deferred_gradients` (one
reduction per optimizer step), `tensor_parallel`, `fsdp1` (for full fine-tuning), `collectives` (operations over ranks).
"""

from lightning_lora.sharding.fsdp1 import BlockwiseFSDPStrategy, clip_gradient_norm
from lightning_lora.sharding.fsdp2 import FSDP2Strategy
from lightning_lora.sharding.shard import shard_lora
from lightning_lora.sharding.tensor_parallel import parallelize_lora

__all__ = ["BlockwiseFSDPStrategy", "FSDP2Strategy", "clip_gradient_norm", "parallelize_lora", "shard_lora"]
