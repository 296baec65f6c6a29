"""LoRA under DeepSpeed ZeRO on CPUs: ``python deepspeed_runs.py RANKS FOLDER STAGE...``; stage 0 is one device.

Final adapters go to ``FOLDER/STAGE.pt``, or why there are none. Stage 2 after ``target`` has batches of one row, and a
`TargetBatchSize`.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import seed_everything
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from lightning_lora import LoRAConfig, lora_state_dict
from lightning_lora.callbacks import LoRAGuard, TargetBatchSize
from lightning_lora.errors import ConfigError
from lightning_lora.tasks import CausalLM
from tests.support import toys

NUM_ROWS, GLOBAL_BATCH = 16, 4


class OnCPU(DeepSpeedStrategy):
    """Lightning asks for CUDA; DeepSpeed itself does not."""

    @override
    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    @override
    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    @override
    def root_device(self) -> torch.device:
        # DeepSpeed asks for the device's number.
        return torch.device("cpu", 0)


def rows() -> list[dict[str, Any]]:
    """As many supervised tokens in each: DeepSpeed averages over micro-batches."""
    made = toys.token_rows(NUM_ROWS)
    for row in made:
        row["labels"] = row["input_ids"].clone()
    return made


def run(ranks: int, folder: Path, stage: int, has_target: bool = False) -> None:
    seed_everything(0, verbose=False)
    module = CausalLM(str(folder / "llama"), 1e-4, lora=LoRAConfig(rank=2))
    trainer = toys.trainer(
        folder,
        devices=ranks,
        strategy=OnCPU(stage=stage, exclude_frozen_parameters=True) if stage else "auto",
        use_distributed_sampler=False,
        max_epochs=3,
        callbacks=[LoRAGuard(), *([TargetBatchSize(GLOBAL_BATCH)] if has_target else [])],
    )
    data: Any = rows()
    sampler = DistributedSampler(data, ranks, trainer.global_rank, shuffle=False)
    try:
        trainer.fit(module, DataLoader(data, 1 if has_target else GLOBAL_BATCH // ranks, sampler=sampler))
    except ConfigError as error:
        torch.save(str(error), folder / f"{stage}.pt")
        return
    if has_target:
        torch.save(
            lora_state_dict(module) if trainer.global_step == 3 * NUM_ROWS // GLOBAL_BATCH else {}, folder / "target.pt"
        )
        return
    if stage:
        trainer.save_checkpoint(folder / f"{stage}.ckpt")
    module.save_adapter(folder / f"{stage}-adapter")
    if trainer.is_global_zero:
        torch.save(lora_state_dict(module), folder / f"{stage}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for chosen in sys.argv[3:]:
        is_target = chosen == "target"
        run(int(sys.argv[1]), Path(sys.argv[2]), 2 if is_target else int(chosen), is_target)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
