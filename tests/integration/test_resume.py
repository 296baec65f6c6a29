"""Two processes go on exactly, each with its own random numbers, rows and half of an accumulation window."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import toys
from tests.support.resuming import differences

pytestmark = [pytest.mark.slow, *toys.expected_warnings]

SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_lora.sharding import shard_lora
from lightning_lora.batch.token_loss import TokenWeightedLoss
from tests.support import resuming, toys

kind, folder, place = sys.argv[1:]

class Ours(resuming.DiceyLoRA, TokenWeightedLoss):
    def configure_model(self):
        torch.manual_seed(1)
        self.apply_lora()
        if kind == "fsdp2":
            shard_lora(self.net, self.device_mesh)
        torch.manual_seed(100 * (place != "-") + self.trainer.global_rank)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        # Every rank has another number of tokens.
        return self.token_loss(loss * 3, torch.tensor(1 + self.trainer.global_rank + batch_idx))

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)

strategy = "ddp" if kind == "ddp" else ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
out = Path(folder) / kind
path = None if place == "-" else out / f"{place}.ckpt"
recorder = resuming.Recorder(out if path is None else None)
trainer = toys.trainer(
    out, devices=2, strategy=strategy, accumulate_grad_batches=3, max_epochs=2, callbacks=[recorder]
)
rows = toys.rows(4 * resuming.NUM_BATCHES)
loader = torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True)
trainer.fit(Ours(), loader, ckpt_path=path, weights_only=True)
trainer.save_checkpoint(out / f"end{place}.ckpt")
torch.save(recorder.outcome.losses, out / f"losses{place}-{trainer.global_rank}.pt")
torch.distributed.destroy_process_group()
"""


def run(kind: str, folder: Path, place: str = "-") -> None:
    toys.run_python(SCRIPT, kind, folder, place, ranks=2)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_go_on(kind: str, tmp_path: Path) -> None:
    run(kind, tmp_path)
    out = tmp_path / kind
    saved = torch.load(out / "batch-0-5.ckpt", weights_only=True)["lightning_lora_resume"]["ranks"]
    assert saved[0]["gradients"]
    assert differences(saved[0], saved[1])
    for place in ("batch-0-5", "epoch-0"):
        run(kind, tmp_path, place)
        ends = [torch.load(out / f"end{name}.ckpt", weights_only=True) for name in ("-", place)]
        assert not differences(*ends), differences(*ends)[:5]
        for rank in (0, 1):
            whole, resumed = (torch.load(out / f"losses{name}-{rank}.pt") for name in ("-", place))
            assert resumed == whole[len(whole) - len(resumed) :]
