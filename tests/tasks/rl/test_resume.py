"""Preference tasks go on exactly from a checkpoint, the reference included, and ranks train as one device does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_lora import LoRAConfig
from lightning_lora.tasks import DPO, RewardModel
from tests.support import tiny_models, toys
from tests.tasks.rl import pairs

pytestmark = toys.expected_warnings

LORA = LoRAConfig(rank=2)


class Stop(Callback):
    """Saves a checkpoint in the middle of an accumulation window, and ends the run."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == 3:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "stop.ckpt")
            trainer.should_stop = True


TASKS: dict[str, dict[str, Any]] = {
    "base": {"task": DPO, "lora": LORA},
    "loaded adapter": {"task": DPO, "lora": LORA, "awake": True},
    "in full": {"task": DPO, "lora": None},
    "reward model": {"task": RewardModel, "lora": LORA},
}


def run(folder: str, place: Path, options: dict[str, Any], **settings: Any) -> LightningModule:
    torch.manual_seed(0)
    module = options["task"](folder, learning_rate=1e-3, lora=options["lora"])
    module.configure_model()
    if options.get("awake") and "ckpt_path" not in settings:
        tiny_models.wake(module, size=0.2)
    pairs.fit(module, place, pairs.loader(2), pairs.loader(2), max_epochs=2, accumulate_grad_batches=3, **settings)
    return module


@pytest.mark.parametrize("options", TASKS.values(), ids=TASKS)
def test_a_run_that_goes_on_is_the_run_without_interruption(options: dict[str, Any], tmp_path: Path) -> None:
    folder = pairs.folder_of_llama(tmp_path)
    whole = run(folder, tmp_path / "whole", options)
    run(folder, tmp_path / "part", options, callbacks=[Stop()])
    again = run(folder, tmp_path / "again", options, ckpt_path=tmp_path / "part" / "stop.ckpt")
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    if isinstance(whole, DPO) and isinstance(again, DPO):
        batch = next(iter(pairs.loader(2)))
        assert torch.equal(whole.score(batch).rewards, again.score(batch).rewards)
        assert whole.reference.kind == again.reference.kind


SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch
from lightning_lora import LoRAConfig
from lightning_lora.tasks import DPO, RewardModel
from tests.support import toys
from tests.tasks.rl import pairs

folder, out, task, ranks = sys.argv[1:]
lora = None if task == "full" else LoRAConfig(rank=2)
strategy = "ddp" if ranks == "2" else "auto"
trainer = toys.trainer(Path(out).parent, devices=int(ranks), strategy=strategy, precision="64-true")
torch.manual_seed(0)
with trainer.init_module():
    module = (RewardModel if task == "reward" else DPO)(folder, 1e-3, lora)
    module.configure_model()
module.configure_optimizers = lambda: torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
trainer.fit(module, pairs.loader(8 // int(ranks), count=16))
if trainer.is_global_zero:
    torch.save({name: p.detach() for name, p in module.named_parameters()}, out)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dpo", "full", "reward"])
def test_two_ranks_are_one_device(task: str, tmp_path: Path) -> None:
    folder, found = pairs.folder_of_llama(tmp_path), []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.pt"
        done = toys.run_python(SCRIPT, folder, out, task, str(ranks), ranks=ranks, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
        found.append(torch.load(out))
    changed = 0
    for name, parameter in found[0].items():
        torch.testing.assert_close(parameter, found[1][name], rtol=1e-12, atol=1e-12)
        changed += "lora_B" in name and bool(parameter.any())
    assert changed or task == "full"
