"""One checkpoint is the same base in every type it is loaded in; another base is refused in every type."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import LlamaForCausalLM

from lightning_lora import LoRAConfig, LoRAMixin, inject_lora, load_adapter, save_adapter
from lightning_lora.errors import BaseMismatchError
from lightning_lora.files.merge.merge_files import merge_files
from tests.support import toys
from tests.support.tiny_models import llama, wake

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
pytestmark = toys.expected_warnings
every_pair = pytest.mark.parametrize(("stored", "trained"), list(product(TYPES, TYPES)))


def _spread(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Give the weights sizes from 1e-9 to 1, some of them below the smallest of float16."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 10 ** -(9 * torch.rand(parameter.shape, generator=generator) ** 3)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of one model in each type, and an adapter of each of them trained in each type."""
    folder = tmp_path_factory.mktemp("types")
    for stored, dtype in TYPES.items():
        _spread(llama()).to(dtype).save_pretrained(folder / stored)  # pyright: ignore[reportArgumentType]
        for trained in TYPES:
            model = loaded(folder / stored, trained)
            inject_lora(model, LoRAConfig(rank=2))
            wake(model)
            save_adapter(model, folder / f"{stored} {trained}")
    return folder


def loaded(folder: Path, dtype: str) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=TYPES[dtype])


@every_pair
def test_an_adapter_fits_its_checkpoint_in_every_type(folders: Path, stored: str, trained: str) -> None:
    for dtype in TYPES:
        load_adapter(loaded(folders / stored, dtype), folders / f"{stored} {trained}")


@every_pair
def test_an_adapter_merges_into_its_checkpoint_whatever_type_it_was_trained_in(
    folders: Path, stored: str, trained: str, tmp_path: Path
) -> None:
    merge_files(folders / stored, folders / f"{stored} {trained}", tmp_path / "merged")


def _a_percent_of_noise(weight: Tensor) -> Tensor:
    return weight + 0.01 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(4))


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "a percent of noise": _a_percent_of_noise,
    "a percent more": lambda weight: weight * 1.01,
    "half a percent more": lambda weight: weight * 1.006,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"])
def test_a_base_that_differs_a_little_in_one_weight_is_refused_in_every_type(
    folders: Path, change: str, name: str, tmp_path: Path
) -> None:
    other = loaded(folders / "float32", "float32")
    with torch.no_grad():
        weight = other.get_parameter(name)
        weight.copy_(CHANGES[change](weight) if weight.std() else weight * 1.01)
    other.save_pretrained(tmp_path / "other")
    for trained, dtype in product(TYPES, TYPES):
        with pytest.raises(BaseMismatchError):
            load_adapter(loaded(tmp_path / "other", dtype), folders / f"float32 {trained}")
    if "mlp" in name:
        for trained in TYPES:
            with pytest.raises(BaseMismatchError):
                merge_files(tmp_path / "other", folders / f"float32 {trained}", tmp_path / "merged")


def test_a_single_changed_weight_is_refused_where_the_types_tell(folders: Path) -> None:
    for trained, dtype in product(TYPES, TYPES):
        other = loaded(folders / "float32", dtype)
        with torch.no_grad():
            other.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 5] += 1
        if (trained == "float16") != (dtype == "float16"):
            continue  # of these pairs, only a few values are compared
        with pytest.raises(BaseMismatchError):
            load_adapter(other, folders / f"float32 {trained}")


class Task(LoRAMixin, LightningModule):
    def __init__(self, folder: Path, dtype: str) -> None:
        super().__init__(lora=LoRAConfig(rank=2))
        self.net = loaded(folder, dtype).train()

    def training_step(self, batch: Any) -> Tensor:
        return self.net(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.float()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.lora_parameter_groups(1e-4))


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_checkpoint_resumes_on_its_base_in_another_type_and_on_no_other_base(
    folders: Path, stored: str, tmp_path: Path
) -> None:
    trainer = toys.trainer(tmp_path, max_epochs=1)
    trainer.fit(Task(folders / stored, "float16"), toys.loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    for dtype in ("bfloat16", "float32"):
        toys.trainer(tmp_path, max_epochs=2).fit(
            Task(folders / stored, dtype), toys.loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
        )
    other = Task(folders / stored, "bfloat16")
    with torch.no_grad():
        other.net.get_parameter("model.norm.weight").mul_(1.01)
    with pytest.raises(BaseMismatchError, match="was trained on a base with fingerprint"):
        toys.trainer(tmp_path, max_epochs=2).fit(
            other, toys.loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
        )
