"""Two processes average what each of them trains, and go on from a checkpoint of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_lora import load_adapter
from tests.callbacks.test_adapter_ema import torchs, trained
from tests.support import toys
from tests.support.resuming import DiceyLoRA, differences

SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_lora.callbacks import AdapterCheckpoint, AdapterEMA
from lightning_lora.sharding import shard_lora
from tests.support import resuming, toys

kind, folder = sys.argv[1], Path(sys.argv[2])

class Ours(resuming.DiceyLoRA):
    def configure_model(self):
        torch.manual_seed(1)
        self.apply_lora()
        if kind == "fsdp2":
            shard_lora(self.net, self.device_mesh)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)

def run(place=None):
    torch.manual_seed(0)
    settings = {"devices": 2, "strategy": "ddp"}
    if kind == "fsdp2":
        settings["strategy"] = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    recorder = resuming.Recorder(folder if place is None else None)
    ema = AdapterEMA(0.6)
    callbacks = [recorder, ema, AdapterCheckpoint(str(folder / f"adapters{place}"))]
    trainer = toys.trainer(folder, max_epochs=2, accumulate_grad_batches=2, callbacks=callbacks, **settings)
    loader = torch.utils.data.DataLoader(toys.rows(4 * resuming.NUM_BATCHES), batch_size=2)
    path = None if place is None else folder / f"{place}.ckpt"
    trainer.fit(Ours(), loader, toys.loader(4), ckpt_path=path, weights_only=True)
    trainer.save_checkpoint(folder / f"end{place}.ckpt")
    return ema

ema = run()
if kind == "fsdp2":
    held = sum(t.to_local().numel() for t in ema._average.values())
    whole = sum(t.numel() for t in ema._average.values())
    assert held < 0.7 * whole, (held, whole)
run("batch-0-3")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_average_what_each_holds(kind: str, tmp_path: Path) -> None:
    toys.run_python(SCRIPT, kind, tmp_path, ranks=2)
    ends = [torch.load(tmp_path / f"end{place}.ckpt", weights_only=True) for place in (None, "batch-0-3")]
    assert not differences(*ends), differences(*ends)[:5]
    steps = [
        torch.load(tmp_path / f"batch-{epoch}-{batch}.ckpt", weights_only=True)["current_model_state"]
        for epoch in (0, 1)
        for batch in (2, 4, 6, 7)
    ]
    assert toys.same({name: ends[0]["state_dict"][name] for name in steps[0]}, torchs(steps))
    other = DiceyLoRA()
    other.apply_lora()
    load_adapter(other, tmp_path / "adaptersNone" / "last", allow_other_base=True)
    assert toys.same(
        {name: tensor for name, tensor in trained(other).items() if "lora_" in name},
        {name: tensor for name, tensor in ends[0]["state_dict"].items() if "lora_" in name},
    )
