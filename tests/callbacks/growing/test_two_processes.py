"""Two processes grow as one device does, and sharded runs are refused where they start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import toys

SCRIPT = """
import os, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, Subset, TensorDataset
from lightning_lora.callbacks import RankGrowth
from tests.callbacks.test_rank_growth import WideLoRA
from tests.support import toys

folder, ranks = Path(sys.argv[1]), int(sys.argv[2])

class Ours(WideLoRA):
    def configure_model(self):
        torch.manual_seed(0)

class Seed(Callback):
    def on_train_batch_start(self, trainer, *args):
        torch.manual_seed(trainer.global_step)

x, y = toys.rows(16).tensors
mine = range(int(os.environ.get("LOCAL_RANK", 0)), 16, ranks)
loader = DataLoader(Subset(TensorDataset(x.double(), y.double()), mine), 4 // ranks)
growth = RankGrowth(every_n_steps=2, threshold=0.001, budget=10_000, max_rank=4)
trainer = toys.trainer(
    folder, max_epochs=3, devices=ranks, strategy="ddp" if ranks > 1 else "auto", callbacks=[Seed(), growth],
    use_distributed_sampler=False,
)
module = Ours().double()
trainer.fit(module, loader)
if trainer.global_rank == 0:
    factors = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    torch.save({"factors": factors, "steps": [growth["step"] for growth in growth.growths]}, folder / f"{ranks}.pt")
if ranks > 1:
    torch.distributed.destroy_process_group()
"""

SHARDED = """
import sys, warnings
warnings.simplefilter("ignore")
import pytest
from pathlib import Path
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_lora.callbacks import RankGrowth
from lightning_lora.errors import ConfigError
from tests.callbacks.test_rank_growth import WideLoRA
from tests.support import toys

strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
trainer = toys.trainer(Path(sys.argv[1]), devices=2, strategy=strategy, callbacks=[RankGrowth()])
with pytest.raises(ConfigError, match="cannot change the shapes that ModelParallelStrategy has sharded"):
    trainer.fit(WideLoRA(), toys.loader())
assert trainer.global_step == 0
"""


@pytest.mark.slow
def test_two_processes_train_what_one_device_does_through_growth(tmp_path: Path) -> None:
    toys.run_python(SCRIPT, tmp_path, 1)
    toys.run_python(SCRIPT, tmp_path, 2, ranks=2)
    one, two = (torch.load(tmp_path / f"{ranks}.pt", weights_only=True) for ranks in (1, 2))
    assert one["steps"] == two["steps"]
    assert len(set(one["steps"])) > 1
    for name, factor in one["factors"].items():
        torch.testing.assert_close(two["factors"][name], factor, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_two_processes_that_shard_are_refused_at_the_start(tmp_path: Path) -> None:
    toys.run_python(SHARDED, tmp_path, ranks=2)
