"""Running statistics that training changed: PEFT restores them from our folder, and so does a merge on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from lightning_lora import LoRAConfig, inject_lora, load_adapter, save_adapter
from lightning_lora.files.merge.merge_files import merge_files
from tests.oracle.peft_models import peft_warnings
from tests.support.tiny_models import wake

pytestmark = peft_warnings

X = torch.linspace(-1, 1, 3 * 32 * 32 * 2).reshape(2, 3, 32, 32)


def resnet() -> ResNetForImageClassification:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "num_labels": 3,
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
    }
    model = ResNetForImageClassification(ResNetConfig(**sizes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Tensor]:
    """Base and adapter folder, and what the trained model computes."""
    folder = tmp_path_factory.mktemp("resnet")
    resnet().save_pretrained(folder / "base")
    model = ResNetForImageClassification.from_pretrained(folder / "base")
    inject_lora(model, LoRAConfig(rank=2, trainable=["classifier"]))
    wake(model)
    model.train()(X)
    save_adapter(model.eval(), folder / "adapter")
    return folder / "base", folder / "adapter", output(model)


def test_peft_restores_the_statistics_without_being_told_of_them(trained: tuple[Path, Path, Tensor]) -> None:
    base, folder, expected = trained
    theirs = peft.PeftModel.from_pretrained(ResNetForImageClassification.from_pretrained(base), folder)
    assert (output(theirs.eval()) - expected).abs().max() <= 1e-5
    assert (output(resnet()) - expected).abs().max() > 1e-2
    # As modules to save they would be copies, which their layers do not use.
    assert not any(
        "norm" in name for name in json.loads((folder / "adapter_config.json").read_text())["modules_to_save"]
    )


def test_load_adapter_restores_them(trained: tuple[Path, Path, Tensor]) -> None:
    base, folder, expected = trained
    model = ResNetForImageClassification.from_pretrained(base)
    load_adapter(model, folder)
    assert torch.equal(output(model.eval()), expected)


def test_a_merge_on_disk_writes_them(trained: tuple[Path, Path, Tensor], tmp_path: Path) -> None:
    base, folder, expected = trained
    merge_files(base, folder, tmp_path / "merged")
    model = ResNetForImageClassification.from_pretrained(tmp_path / "merged")
    assert (output(model.eval()) - expected).abs().max() <= 1e-5
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(int(value) == 1 for name, value in stored.items() if name.endswith("num_batches_tracked"))
