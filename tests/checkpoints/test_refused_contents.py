"""Checkpoints that do not fit a module are refused before anything is loaded, and pickled code in them never runs."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_lora import AdapterFileError, BaseMismatchError, ConfigError, LoRAConfig, merge_lora
from lightning_lora.checkpoints.contents import refuse_adapter
from lightning_lora.files.lightning_checkpoint import CHECKPOINT_KEY
from tests.support import toys
from tests.support.payload import Payload
from tests.support.toy_checkpoints import content, saved, without_lora
from tests.support.toys import Toy, fit

pytestmark = toys.expected_warnings


def other_rank() -> LightningModule:
    module = Toy()
    module.lora = LoRAConfig(rank=1)
    return module


def other_targets() -> LightningModule:
    module = Toy()
    module.lora = LoRAConfig(rank=2, targets=["first"])
    return module


def other_base() -> LightningModule:
    return Toy(seed=5)


REFUSED = [
    (other_rank, AdapterFileError, r"net.first.lora_A has shape \(2, 4\), expected \(1, 4\)"),
    (other_targets, AdapterFileError, "2 of 2 expected tensors disagree: unknown net.second.lora_A"),
    (without_lora, AdapterFileError, "holds a LoRA adapter only, but the module has lora=None.*'rank': 2"),
    (other_base, BaseMismatchError, "trained on a base with fingerprint .*set lora_allow_other_base = True"),
]


@pytest.mark.parametrize(("make", "error", "text"), REFUSED, ids=[case[0].__name__ for case in REFUSED])
def test_checkpoint_that_does_not_fit_is_refused(
    make: Callable[[], LightningModule], error: type[Exception], text: str, tmp_path: Path
) -> None:
    path = saved(tmp_path)
    module = make()
    module.configure_model()
    before = toys.snapshot(module)
    with pytest.raises(error, match=text):
        fit(module, tmp_path, path, max_epochs=2)
    assert toys.same(before, toys.snapshot(module))
    with pytest.raises(error, match=text):
        module.on_load_checkpoint(content(path))
    assert toys.same(before, toys.snapshot(module))


def test_full_checkpoint_into_lora_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, without_lora())
    with pytest.raises(AdapterFileError, match=r"this checkpoint holds no adapter.*Load it with lora=None"):
        Toy.load_from_checkpoint(path, weights_only=True)


def test_both_ways_that_this_error_names_work(tmp_path: Path) -> None:
    path = saved(tmp_path, without_lora())
    trained = content(path)["state_dict"]

    class Full(Toy):
        lora = None

    assert toys.same(Full.load_from_checkpoint(path, weights_only=True).state_dict(), trained)
    module = Toy(seed=3)
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    fit(module, tmp_path)
    assert toys.same(toys.base_of(module), trained)
    assert all(toys.moved(module))


def test_other_base_is_refused_with_the_names_of_what_differs(tmp_path: Path) -> None:
    path = saved(tmp_path)

    class Other(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.net.second.bias.data += 1

    with pytest.raises(BaseMismatchError, match=r"1 of 4 frozen parameters differ: net.second.bias\. Load the right"):
        Other.load_from_checkpoint(path, weights_only=True)


def test_a_file_of_an_earlier_version_without_names_is_checked_too(tmp_path: Path) -> None:
    checkpoint = content(saved(tmp_path))
    del checkpoint[CHECKPOINT_KEY]["base"], checkpoint[CHECKPOINT_KEY]["moved"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    Toy.load_from_checkpoint(tmp_path / "old.ckpt", weights_only=True)
    with pytest.raises(BaseMismatchError, match=r"the module's base has [0-9a-f]{32}\. Load the right base"):
        Toy.load_from_checkpoint(tmp_path / "old.ckpt", weights_only=True, seed=5)


def test_other_base_can_be_allowed(tmp_path: Path) -> None:
    path = saved(tmp_path)
    module = Toy(seed=5)
    module.lora_allow_other_base = True
    before = toys.base_of(module)
    fit(module, tmp_path, path, max_epochs=2)
    assert toys.same(before, toys.base_of(module))


def test_missing_tensor_is_refused(tmp_path: Path) -> None:
    checkpoint = content(saved(tmp_path))
    del checkpoint["state_dict"]["net.second.lora_B"]
    torch.save(checkpoint, tmp_path / "cut.ckpt")
    with pytest.raises(AdapterFileError, match=r"missing net.second.lora_B"):
        Toy.load_from_checkpoint(tmp_path / "cut.ckpt", weights_only=True)


DAMAGED = [
    ({}, "it lacks base_fingerprint, config, format, tensors"),
    ({"format": 1, "config": {}, "tensors": {}}, "it lacks base_fingerprint"),
    ([], "it is a list, not a mapping"),
    ("text", "it is a str, not a mapping"),
]


@pytest.mark.parametrize(("manifest", "fault"), DAMAGED)
def test_damaged_manifest_is_refused(manifest: Any, fault: str, tmp_path: Path) -> None:
    checkpoint = content(saved(tmp_path)) | {CHECKPOINT_KEY: manifest}
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    with pytest.raises(AdapterFileError, match=rf"'lightning_lora' entry is damaged: {fault}\. Load another"):
        Toy.load_from_checkpoint(tmp_path / "bad.ckpt", weights_only=True)


def test_newer_format_is_refused(tmp_path: Path) -> None:
    checkpoint = content(saved(tmp_path))
    checkpoint[CHECKPOINT_KEY]["format"] = 99
    torch.save(checkpoint, tmp_path / "new.ckpt")
    with pytest.raises(AdapterFileError, match="format 99 is newer than 1: update lightning-lora"):
        Toy.load_from_checkpoint(tmp_path / "new.ckpt", weights_only=True)


@pytest.mark.parametrize("place", ["state_dict", "optimizer_states", CHECKPOINT_KEY, "loops"])
def test_pickled_payload_in_a_checkpoint_does_not_run(place: str, tmp_path: Path) -> None:
    checkpoint = content(saved(tmp_path))
    sentinel = tmp_path / "sentinel"
    checkpoint[place] = Payload(sentinel)
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    for load in (
        lambda: Toy.load_from_checkpoint(tmp_path / "bad.ckpt", weights_only=True),
        lambda: fit(Toy(), tmp_path, tmp_path / "bad.ckpt"),
    ):
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            load()
    assert not sentinel.exists()


def test_save_while_merged_is_refused(tmp_path: Path) -> None:
    module = Toy()
    runner = fit(module, tmp_path)
    merge_lora(module)
    with pytest.raises(ConfigError, match="cannot save a checkpoint: 2 layers are merged"):
        runner.save_checkpoint(tmp_path / "a.ckpt")


def test_plain_checkpoint_into_a_module_without_lora_is_not_our_business(tmp_path: Path) -> None:
    path = saved(tmp_path, without_lora())
    checkpoint = content(path)
    refuse_adapter(checkpoint)
    assert CHECKPOINT_KEY not in checkpoint
