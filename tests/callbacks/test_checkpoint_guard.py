"""A folder that cannot hold the checkpoints of a run is reported before the run."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from lightning_lora.callbacks import CheckpointGuard
from lightning_lora.callbacks.checkpoint_guard import checkpoint_bytes
from lightning_lora.checkpoints.verified_io import VerifiedCheckpointIO, verified_io
from lightning_lora.errors import ConfigError
from lightning_lora.files.checkpoint_manifest import SUFFIX
from lightning_lora.lora.config import LoRAConfig
from tests.support import toys
from tests.support.adapter_files import dead_pid, leftover
from tests.support.toys import Plain, Toy

pytestmark = toys.expected_warnings


class Counted(Plain):
    """A module that counts its training steps."""

    steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        return super().training_step(batch, batch_idx)


class Heavy(Counted):
    """Has a buffer that claims to hold ``size`` bytes but allocates four."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("heavy", torch.zeros(1).expand(size // 4))


def fit(folder: Path, module: LightningModule, keep: Any = None, **options: Any) -> Trainer:
    keep = ModelCheckpoint(folder / "kept", filename="{step}") if keep is None else keep
    trainer = toys.trainer(folder, **({"enable_checkpointing": True, "callbacks": [CheckpointGuard(), keep]} | options))
    trainer.fit(module, toys.loader())
    return trainer


def test_it_makes_checkpoints_verified_and_leaves_nothing_else(tmp_path: Path) -> None:
    fit(tmp_path, Toy())
    assert sorted(os.listdir(tmp_path / "kept")) == ["step=4.ckpt", f"step=4.ckpt{SUFFIX}"]


def test_it_leaves_a_checkpoint_io_of_the_user_alone(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Toy(), plugins=[TorchCheckpointIO()])
    assert type(trainer.strategy.checkpoint_io) is TorchCheckpointIO
    assert os.listdir(tmp_path / "kept") == ["step=4.ckpt"]
    inner = VerifiedCheckpointIO()
    trainer = fit(tmp_path, Toy(), plugins=[AsyncCheckpointIO(inner)], max_epochs=2)
    assert verified_io(trainer) is inner


def test_folder_that_cannot_be_written_stops_the_run_before_its_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    module = Counted()
    with pytest.raises(ConfigError, match=r"checkpoints cannot be written to .*file/kept: .*Set another dirpath"):
        fit(tmp_path, module, ModelCheckpoint(tmp_path / "file" / "kept"))
    assert module.steps == 0


READ_ONLY = """
import os, sys, warnings
from pathlib import Path
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_lora.callbacks import CheckpointGuard
from lightning_lora.checkpoints.verified_io import VerifiedCheckpointIO
from tests.support import toys

warnings.simplefilter("ignore")
if os.geteuid() == 0:
    os.seteuid(65534)
folder, who = Path(sys.argv[1]), sys.argv[2]
trainer = toys.trainer(
    folder,
    enable_checkpointing=True,
    callbacks=[*([CheckpointGuard()] if who == "guard" else []), ModelCheckpoint(folder)],
    plugins=[VerifiedCheckpointIO()] if who == "plugin" else [],
)
trainer.fit(toys.Toy(), toys.loader())
print("done")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs POSIX users")
@pytest.mark.parametrize(
    ("who", "text"),
    [
        ("guard", "Error: checkpoints cannot be written to {folder}: Permission denied"),
        ("plugin", "PermissionError: [Errno 13] Permission denied: '{folder}/"),
    ],
)
def test_folder_without_permission_ends_the_run(who: str, text: str) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folder is closed to other users
        folder = os.path.realpath(name)
        os.chmod(folder, 0o555)
        done = toys.run_python(READ_ONLY, folder, who, check=False)
        os.chmod(folder, 0o755)
        assert os.listdir(folder) == []
    assert done.returncode != 0
    assert text.format(folder=folder) in done.stderr


def test_disk_without_room_for_one_checkpoint_stops_the_run(tmp_path: Path) -> None:
    module = Heavy(10**15)
    text = r"kept has [0-9,.]+ MB free; a checkpoint of this run needs about 1,000,000,000.0 MB, and 1 are kept while"
    with pytest.raises(ConfigError, match=text):
        fit(tmp_path, module)
    assert module.steps == 0


def test_disk_without_room_for_all_that_is_kept_is_a_warning(tmp_path: Path) -> None:
    module = Heavy(int(shutil.disk_usage(tmp_path).free * 0.6))
    keep = ModelCheckpoint(tmp_path / "kept", monitor=None, save_last=True)
    with pytest.warns(UserWarning, match=r"and 2 are kept while the next is written, about .*Free some space, set"):
        fit(tmp_path, module, keep)
    assert module.steps == 4


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, 1),
        ({"save_last": True}, 2),
        ({"save_last": "link"}, 1),
        ({"save_top_k": 3, "monitor": "val_loss", "save_last": True}, 4),
        ({"save_top_k": 0, "save_last": True}, 1),
        ({"save_top_k": -1}, 7),
        ({"save_top_k": -1, "every_n_epochs": 2}, 3),
        ({"save_top_k": -1, "every_n_train_steps": 10, "save_last": True}, 3),
    ],
)
def test_the_message_counts_what_will_be_kept(settings: dict[str, Any], kept: int, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, **settings)
    with pytest.raises(ConfigError, match=f"and {kept} are kept"):
        fit(tmp_path, Heavy(10**15), keep, max_epochs=7, max_steps=28)


class Wide(Toy):
    """A module whose layers are large beside the rest of a checkpoint."""

    def __init__(self, optimizer: str, lora: LoRAConfig | None) -> None:
        super().__init__()
        self.net = toys.Net(width=30_000)
        self.lora, self.optimizer = lora, optimizer

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return {
            "adamw": lambda: torch.optim.AdamW(parameters),
            "amsgrad": lambda: torch.optim.Adam(parameters, amsgrad=True),
            "sgd": lambda: torch.optim.SGD(parameters, lr=0.1),
            "momentum": lambda: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        }[self.optimizer]()


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("lora", [LoRAConfig(rank=2), None], ids=["lora", "full"])
@pytest.mark.parametrize("optimizer", ["adamw", "amsgrad", "sgd", "momentum"])
def test_the_size_is_that_of_the_file(
    optimizer: str, lora: LoRAConfig | None, weights_only: bool, tmp_path: Path
) -> None:
    module = Wide(optimizer, lora)
    trainer = toys.trainer(tmp_path)
    trainer.fit(module, toys.loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
    size = (tmp_path / "a.ckpt").stat().st_size
    # The random numbers of the run, about 52 kB, are not counted.
    assert checkpoint_bytes(trainer, module, weights_only) == pytest.approx(size, rel=0.05, abs=60_000)


def test_what_killed_writers_have_left_is_removed_at_the_start(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    leftover(folder / "step=99.ckpt", dead_pid()).write_bytes(b"half")
    (folder / f"step=99.ckpt{SUFFIX}").write_text("{}")
    with pytest.warns(UserWarning, match=r"removed 1 unfinished temporary copies of .*step=99.ckpt left by killed"):
        fit(tmp_path, Toy())
    assert sorted(os.listdir(folder)) == ["step=4.ckpt", f"step=4.ckpt{SUFFIX}"]


def test_fast_dev_run_and_runs_without_checkpoints_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    fit(tmp_path, Toy(), ModelCheckpoint(tmp_path / "file" / "kept"), fast_dev_run=True)
    fit(tmp_path, Toy(), callbacks=[CheckpointGuard()], enable_checkpointing=False)
    assert os.listdir(tmp_path) == ["file"]


def test_tasks_write_verified_checkpoints_by_themselves(llama_folder: Path, tmp_path: Path) -> None:
    from lightning_lora.tasks import CausalLM

    trainer = toys.trainer(tmp_path)
    rows: Any = toys.token_rows()
    trainer.fit(CausalLM(str(llama_folder), 1e-3, lora=LoRAConfig(rank=2)), torch.utils.data.DataLoader(rows))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert (tmp_path / f"a.ckpt{SUFFIX}").is_file()
