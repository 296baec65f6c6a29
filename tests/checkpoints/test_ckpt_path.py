"""What is given as ckpt_path and is no checkpoint is named, with the way to use it, and nothing is changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO
from peft import LoraConfig, get_peft_model

from lightning_lora import AdapterFileError, load_adapter, save_adapter
from lightning_lora.callbacks import CheckpointGuard, LoRA
from lightning_lora.checkpoints.shards import META
from lightning_lora.cli import main as cli
from tests.support import toys
from tests.support.toys import Plain, Toy

pytestmark = toys.expected_warnings


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each thing that is no checkpoint."""
    folder = tmp_path_factory.mktemp("things")
    module = Toy()
    runner = toys.trainer(folder / "unused", max_epochs=1)
    runner.fit(module, toys.loader())
    save_adapter(module, folder / "ours")
    get_peft_model(toys.Net(), LoraConfig(target_modules=["first"])).save_pretrained(str(folder / "peft"))
    shutil.copytree(folder / "ours", folder / "run" / "adapters" / "last")
    shutil.copytree(folder / "run", folder / "saved")
    (folder / "saved" / "checkpoints").mkdir()
    (folder / "saved" / "checkpoints" / "last.ckpt").touch()
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").touch()
    (folder / "shards").mkdir()
    (folder / "shards" / META).touch()
    (folder / "empty").mkdir()
    torch.save({"net.first.weight": torch.zeros(1)}, folder / "pytorch_model.bin")
    return folder


THINGS = {
    "ours": r"ours is an adapter folder, .*one of its checkpoints \(\*.ckpt\).*call load_adapter\(module, '.*/ours'\)",
    "ours/adapter_model.safetensors": "ours is an adapter folder",
    "peft": r"peft is an adapter folder.*merge BASE .*/peft OUT",
    "run": r"run is a folder with adapters and no checkpoint; the latest is .*adapters/last. To continue",
    "run/adapters": "is a folder with adapters and no checkpoint",
    "saved": r"saved is a folder: give one of the checkpoints in it; the latest is .*/saved/checkpoints/last.ckpt",
    "model": "model is the folder of a Hugging Face model, no checkpoint: give it as the model itself",
    "model/model.safetensors": "holds weights only and is not a checkpoint of Lightning",
    "empty": r"empty is a folder and holds no checkpoint \(\*.ckpt\)",
}


def refused(trainer: Trainer, module: LightningModule, path: Path, words: str, stage: str = "fit") -> None:
    before = toys.base_of(module)
    with pytest.raises(AdapterFileError, match=words):
        getattr(trainer, stage)(module, toys.loader(), ckpt_path=path)
    assert toys.same(before, toys.base_of(module))


@pytest.mark.parametrize("name", THINGS)
@pytest.mark.parametrize("callbacks", [[], [CheckpointGuard()]], ids=["plain", "verified"])
def test_each_thing_is_named(name: str, callbacks: list[Callback], things: Path, tmp_path: Path) -> None:
    refused(toys.trainer(tmp_path, callbacks=callbacks), Toy(), things / name, THINGS[name])


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("how", [Toy, Plain])
def test_in_every_stage_and_with_the_callback(
    stage: str, how: Callable[[], LightningModule], things: Path, tmp_path: Path
) -> None:
    callbacks: list[Callback] = [LoRA({"rank": 2})] if how is Plain else []
    refused(toys.trainer(tmp_path, callbacks=callbacks), how(), things / "ours", "is an adapter folder", stage)


def test_in_full_fine_tuning_and_beside_an_asynchronous_writer(things: Path, tmp_path: Path) -> None:
    module = Toy()
    module.lora = None
    refused(toys.trainer(tmp_path, plugins=[AsyncCheckpointIO()]), module, things / "ours", "is an adapter folder")


def test_the_way_that_is_named_works(things: Path, tmp_path: Path) -> None:
    module = Toy()
    load_adapter(module, things / "ours")
    before = toys.snapshot(module)
    toys.trainer(tmp_path).test(module, toys.loader(), verbose=False)
    assert toys.same(before, toys.snapshot(module))


def test_a_folder_of_shards_is_read_or_told_how(things: Path, tmp_path: Path) -> None:
    refused(toys.trainer(tmp_path), Toy(), things / "shards", r"add the callback CheckpointGuard, or .*consolidate")
    # This one reads such folders, and says what is wrong with this one.
    refused(
        toys.trainer(tmp_path, callbacks=[CheckpointGuard()]), Toy(), things / "shards", "cannot be read as a folder"
    )


def test_a_file_of_torch_that_lightning_did_not_write_is_named(things: Path, tmp_path: Path) -> None:
    words = "pytorch_model.bin is not a checkpoint of Lightning: it holds net.first.weight"
    refused(toys.trainer(tmp_path), Toy(), things / "pytorch_model.bin", words)


def test_a_checkpoint_io_of_the_user_may_take_any_folder(things: Path, tmp_path: Path) -> None:
    class Asked(Exception): ...

    class Own(CheckpointIO):
        def save_checkpoint(self, *arguments: object, **options: object) -> None: ...
        def remove_checkpoint(self, path: object) -> None: ...
        def load_checkpoint(self, *arguments: object, **options: object) -> dict[str, object]:
            raise Asked

    with pytest.raises(Asked):
        toys.trainer(tmp_path, plugins=[Own()]).fit(Toy(), toys.loader(), ckpt_path=things / "empty")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("ours", "is an adapter folder"),
        ("model/model.safetensors", "holds weights only"),
        ("absent.ckpt", "there is no "),
        ("best", "a command is a process of its own: give the path"),
    ],
)
def test_commands_say_it_before_the_model_is_built(
    command: str, path: str, words: str, things: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = path if path == "best" else str(things / path)
    assert cli.main([command, "--model=CausalLM", "--model.model=absent", f"--ckpt_path={given}"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line
