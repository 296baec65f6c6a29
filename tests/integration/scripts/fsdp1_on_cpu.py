"""Lightning's FSDPStrategy on CPU with gloo, which Lightning 2.6.6 refuses (later versions allow it).

What differs from the strategy on a GPU: FSDP is told that its device is the CPU, and gathered state is not offloaded to
where it is already, which makes torch write into freed memory (pytorch #188990).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.sharding import BlockwiseFSDPStrategy


class FSDPOnCPU(FSDPStrategy):
    """The strategy with nothing else changed; torch's guard and Lightning's are about the type of the device."""

    @override
    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        with nothing_offloaded():
            return super().lightning_module_state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        with nothing_offloaded():
            return super().optimizer_state(optimizer)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        with nothing_offloaded():
            return super().load_checkpoint(checkpoint_path, weights_only)


class BlockwiseFSDPOnCPU(BlockwiseFSDPStrategy, FSDPOnCPU):
    """Ours on CPU: one unit per block."""


@contextmanager
def nothing_offloaded() -> Iterator[None]:
    """Within, states are gathered without being copied to the CPU; what asks for that gets the original."""
    original = FullyShardedDataParallel.state_dict_type

    def without(module: nn.Module, state_dict_type: Any, *configs: Any, **named: Any) -> Any:
        for config in (*configs, *named.values()):
            config.offload_to_cpu = False
        return original(module, state_dict_type, *configs, **named)

    with patch.object(FullyShardedDataParallel, "state_dict_type", staticmethod(without)):
        yield
