"""Two ranks write one checkpoint and resume from it, whole and damaged: ``python two_rank_checkpoints.py FOLDER``.

What each rank has seen goes to ``FOLDER/RANK.txt``.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora.callbacks import CheckpointGuard
from lightning_lora.checkpoints.verified_io import verified_io
from lightning_lora.errors import AdapterFileError
from tests.support import toys


def fit(folder: Path, epochs: int, ckpt_path: Path | None = None) -> Trainer:
    trainer = toys.trainer(
        folder,
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,
        max_epochs=epochs,
        enable_checkpointing=True,
        callbacks=[CheckpointGuard(), ModelCheckpoint(folder / "kept", filename="{step}", save_top_k=-1)],
    )
    trainer.fit(toys.Toy(), toys.loader(), ckpt_path=ckpt_path)
    return trainer


def run(folder: Path) -> None:
    early, late = folder / "kept" / "step=4.ckpt", folder / "kept" / "step=8.ckpt"
    trainer = fit(folder, 2)
    rank = trainer.global_rank
    lines = [",".join(sorted(os.listdir(folder / "kept")))]
    try:
        fit(folder, 3, early if rank else late)
    except AdapterFileError as error:
        lines.append(str(error))
    torch.distributed.barrier()
    if rank == 0:
        content = bytearray(late.read_bytes())
        content[len(content) // 2] ^= 1
        late.write_bytes(content)
    torch.distributed.barrier()
    resumed = fit(folder, 3, late)
    io = verified_io(resumed)
    assert io is not None
    assert io.loaded is not None
    lines.append(f"{io.loaded[0]} {resumed.global_step}")
    (folder / f"{rank}.txt").write_text("\n".join(lines))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
