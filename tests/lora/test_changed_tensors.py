"""What training changes without an optimizer is known by what it was at injection, and goes with the adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver

from lightning_lora import AdapterFileError, LoRAConfig, inject_lora, load_adapter, remove_lora, save_adapter
from lightning_lora.files.adapter.manifest import MANIFEST_FILE
from lightning_lora.files.merge.merged_model import save_merged
from lightning_lora.lora.changed_tensors import changed_tensors
from tests.support.toys import same

CONFIG = LoRAConfig(rank=2)
X = torch.linspace(-1, 1, 32).reshape(8, 4)


class Scratch(nn.Module):
    """A buffer that is no part of the state."""

    constant: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scratch", torch.zeros(4), persistent=False)
        self.register_buffer("constant", torch.arange(4.0))
        self.register_buffer("edges", torch.eye(4).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        self.scratch = x[0].detach()
        return x + self.constant


def net(seed: int = 0, *more: nn.Module) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Scratch(), *more)


def trained(*more: nn.Module) -> nn.Sequential:
    module = net(0, *more)
    inject_lora(module, CONFIG)
    module.train()(X)
    return module


STATISTICS = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_only_saved_buffers_that_changed_travel(tmp_path: Path) -> None:
    module = net()
    inject_lora(module, CONFIG)
    module.eval()(X)
    assert not changed_tensors(module)
    module.train()(X)
    assert changed_tensors(module).keys() == STATISTICS
    save_adapter(module, tmp_path / "adapter")
    assert set(json.loads((tmp_path / "adapter" / MANIFEST_FILE).read_text())["moved"]) == STATISTICS
    again = net()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again.eval()(X), module.eval()(X))
    assert not any(parameter.requires_grad for parameter in again[1].parameters())


def test_a_loaded_adapter_saved_again_still_holds_them(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path / "one")
    again = net()
    load_adapter(again, tmp_path / "one")
    assert changed_tensors(again).keys() == STATISTICS
    save_adapter(again, tmp_path / "two")
    third = net()
    load_adapter(third, tmp_path / "two")
    assert torch.equal(third.eval()(X), again.eval()(X))


def test_a_single_changed_element_of_a_large_buffer_is_seen() -> None:
    module = net()
    queue = torch.zeros(300_000)
    module.register_buffer("queue", queue)
    inject_lora(module, CONFIG)
    queue[1] = 1
    assert changed_tensors(module).keys() == {"queue"}


def test_a_buffer_without_values_at_injection_counts_as_changed() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    inject_lora(module, CONFIG)
    module.to_empty(device="cpu")
    assert changed_tensors(module).keys() == STATISTICS


def test_removing_the_adapters_forgets_and_injecting_again_looks_again() -> None:
    module = trained()
    remove_lora(module)
    assert not changed_tensors(module)
    assert not any("lora" in name for child in module.modules() for name in child.__dict__)
    inject_lora(module, CONFIG)
    assert not changed_tensors(module)


@pytest.mark.parametrize("observer", [MinMaxObserver, lambda: PerChannelMinMaxObserver(ch_axis=1)])
def test_ranges_that_an_observer_saw_travel(observer: type[nn.Module], tmp_path: Path) -> None:
    module = trained(observer())
    save_adapter(module, tmp_path / "adapter")
    again = net(0, observer())
    load_adapter(again, tmp_path / "adapter")
    assert all(torch.isfinite(buffer).all() for buffer in again[3].buffers())
    assert same(dict(again[3].named_buffers()), dict(module[3].named_buffers()))


def test_a_buffer_of_another_shape_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    save_adapter(trained(nn.BatchNorm1d(4, affine=False)), tmp_path / "adapter")
    other = net(0, nn.BatchNorm1d(5, affine=False))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items() if name != "2.edges"}
    with pytest.raises(AdapterFileError, match=r"3.running_mean has shape \(4,\), expected \(5,\)"):
        load_adapter(other, tmp_path / "adapter")
    assert same(before, {name: tensor for name, tensor in other.state_dict().items() if name != "2.edges"})


def test_a_merged_model_holds_them(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    inject_lora(module, CONFIG)
    module.train()(X)
    save_merged(module, tmp_path / "merged")
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(stored[name], buffer) for name, buffer in module.named_buffers())
