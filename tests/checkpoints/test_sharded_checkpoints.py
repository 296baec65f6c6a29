"""Checkpoints of FSDP2, in one file or in shards, resume exactly, and a damaged file is refused."""

from __future__ import annotations

import pytest
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_lora.files.checkpoint_manifest import SUFFIX
from tests.support import toys

pytestmark = [pytest.mark.slow, *toys.expected_warnings]

SCRIPT = """
import os, sys, torch
from pathlib import Path
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_lora.callbacks import CheckpointGuard
from lightning_lora.sharding import shard_lora
from tests.support import toys

folder = Path(sys.argv[1])

class Sharded(toys.Toy):
    def configure_model(self):
        if not hasattr(self, "sharded"):
            self.apply_lora()
            shard_lora(self.net, self.device_mesh)
            self.sharded = True

def run(epochs, ckpt_path=None, in_shards=False, **options):
    torch.manual_seed(0)
    module = Sharded()
    strategy = ModelParallelStrategy(1, 1, save_distributed_checkpoint=in_shards)
    trainer = toys.trainer(folder, max_epochs=epochs, strategy=strategy, **options)
    trainer.fit(module, toys.loader(), ckpt_path=ckpt_path, weights_only=True)
    return module, trainer

def run_verified(epochs, ckpt_path=None):
    keep = ModelCheckpoint(folder / "kept", filename="{step}", save_top_k=-1)
    callbacks = [keep, CheckpointGuard()]
    return run(epochs, ckpt_path, callbacks=callbacks, enable_checkpointing=True)[0]

def same(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a.full_tensor(), b.full_tensor()) for a, b in pairs)

whole, _ = run(2, in_shards=True)
_, half = run(1, in_shards=True)
half.save_checkpoint(folder / "shards")
resumed, _ = run(2, folder / "shards", in_shards=True)
print(same(whole, resumed))

run_verified(1)
path = folder / "kept" / "step=4.ckpt"
print(sorted(os.listdir(path.parent)))
print(same(run_verified(2), run_verified(2, path)))
content = bytearray(path.read_bytes())
content[path.read_bytes().index(torch.load(path)["state_dict"]["net.first.lora_B"].numpy().tobytes())] ^= 1
path.write_bytes(content)
try:
    run_verified(2, path)
except ValueError as error:
    print(error)
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the script has printed."""
    return toys.run_python(SCRIPT, tmp_path_factory.mktemp("sharded")).stdout.splitlines()[-4:]


def test_a_checkpoint_in_shards_is_left_whole_and_resumes(said: list[str]) -> None:
    assert ModelParallelStrategy()._save_distributed_checkpoint  # the default of Lightning
    assert said[0] == "True"


def test_whole_checkpoints_of_fsdp2_are_verified_too(said: list[str]) -> None:
    assert said[1] == str(["step=4.ckpt", f"step=4.ckpt{SUFFIX}"])
    assert said[2] == "True"
    assert "step=4.ckpt is damaged: its SHA-256" in said[3]
