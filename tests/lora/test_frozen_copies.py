"""A network that was frozen as a copy of another one keeps frozen adapters; any other frozen module is adapted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_lora import (
    AdapterFileError,
    LoRAConfig,
    inject_lora,
    load_adapter,
    lora_layers,
    remove_lora,
    save_adapter,
)
from lightning_lora.callbacks import LoRAGuard
from lightning_lora.files.merge.merge_files import merge_files
from lightning_lora.lora.frozen_copies import frozen_copies
from lightning_lora.lora.gradient_start import gradient_init
from lightning_lora.lora.layers.adapted import learning_layers
from tests.support import toys

pytestmark = toys.expected_warnings

CONFIG = LoRAConfig(rank=2)
X = torch.linspace(-1, 1, 32).reshape(8, 4)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.online = net()
        self.head = nn.Linear(4, 4)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.online(x)) + self.target(x)


def test_a_frozen_copy_keeps_frozen_adapters_with_the_factors_of_the_original() -> None:
    module = Pair()
    report = inject_lora(module, CONFIG)
    assert list(learning_layers(module)) == ["online.0", "online.2", "head"]
    assert not any(parameter.requires_grad for parameter in module.target.parameters())
    assert "2 adapters stay frozen, and are saved, in what was frozen before: target, unlike online" in str(report)
    pairs = list(zip(module.online.parameters(), module.target.parameters(), strict=True))
    assert all(torch.equal(own, other) for own, other in pairs)
    # The same function also after the original has moved and the copy has followed.
    with torch.no_grad():
        for own, other in pairs:
            if own.requires_grad:
                other.copy_(own.add_(0.5))
    assert torch.equal(module.online(X), module.target(X))


@pytest.mark.parametrize("moved", [False, True])
def test_a_frozen_copy_starts_along_the_gradient_of_the_original_unless_it_has_factors_of_its_own(moved: bool) -> None:
    """An average of factors that start elsewhere would apply the student's changes to random directions."""
    module: Any = Pair()
    inject_lora(module, LoRAConfig(rank=1, init="gradient"))
    before, expected = module.target(X).detach(), module.target[0].lora_A.detach().clone()
    if moved:
        module.target[0].lora_A.detach().add_(1)
    gradient_init(module, lambda x: module(x).square().mean(), [X])
    own, other = module.online[0], module.target[0]
    assert own.lora_B.any()
    if moved:
        assert torch.equal(other.lora_A, expected + 1)
        assert not other.lora_B.any()
    else:
        assert all(map(torch.equal, own.lora_pair(), other.lora_pair()))
    assert all(map(torch.equal, module.online[2].lora_pair(), module.target[2].lora_pair()))
    torch.testing.assert_close(module.target(X), before)


def test_a_wholly_frozen_module_gets_adapters_that_train() -> None:
    module = Pair().requires_grad_(False)
    report = inject_lora(module, CONFIG)
    assert len(learning_layers(module)) == len(lora_layers(module)) == 5
    assert "frozen" not in str(report)


def test_a_frozen_body_under_a_head_that_trains_gets_adapters_that_train() -> None:
    module = nn.Sequential(net().requires_grad_(False), nn.Linear(4, 4))
    report = inject_lora(module, CONFIG)
    assert list(learning_layers(module)) == ["0.0", "0.2", "1"]
    assert "adapters train in 2 layers that were frozen before: 0.0, 0.2" in str(report)


def test_adapters_that_are_asked_for_in_frozen_copies_alone_train() -> None:
    module = Pair()
    inject_lora(module, LoRAConfig(rank=2, targets=["target.*"]))
    assert list(learning_layers(module)) == ["target.0", "target.2"]


def test_a_copy_inside_a_frozen_part_that_is_none_is_found() -> None:
    module = nn.ModuleDict({"student": nn.ModuleDict({"body": net(), "more": nn.Linear(4, 3)})})
    module["teacher"] = nn.ModuleDict({"body": net(), "other": nn.Linear(4, 2)}).requires_grad_(False)
    assert frozen_copies(module) == {"teacher.body": "student.body"}


def test_a_copy_is_one_layer_if_that_is_all_of_it() -> None:
    module = nn.ModuleDict({"q": nn.Linear(4, 2), "target": nn.Linear(4, 2).requires_grad_(False)})
    inject_lora(module, CONFIG)
    assert list(learning_layers(module)) == ["q"]


def test_a_module_that_is_trained_in_full_stays_frozen_in_the_copy() -> None:
    module = nn.ModuleDict({"q": net(), "target": net().requires_grad_(False)})
    inject_lora(module, LoRAConfig(rank=2, targets=["0"], trainable=["2"]))
    assert all(parameter.requires_grad for parameter in module.get_submodule("q.2").parameters())
    assert not any(parameter.requires_grad for parameter in module["target"].parameters())


@pytest.mark.parametrize("settings", [{"exclude": ["target.*"]}, {"targets": ["online.*"]}])
def test_a_copy_adapted_in_other_layers_is_told(settings: dict[str, Any]) -> None:
    report = inject_lora(Pair(), LoRAConfig(rank=2, **settings))
    assert "target is a frozen copy of online but not adapted in the same layers" in str(report)
    assert "zip(parameters()) would mix" in str(report)


def test_a_copy_made_of_an_adapted_network_is_accepted_where_it_is_frozen(tmp_path: Path) -> None:
    class Byol(toys.Toy):
        def __init__(self) -> None:
            super().__init__()
            self.apply_lora()
            self.target = copy.deepcopy(self.net).requires_grad_(False)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            for own, other in zip(self.net.parameters(), self.target.parameters(), strict=True):
                other.data.mul_(0.9).add_(own.data, alpha=0.1)

    module = Byol()
    trainer = toys.trainer(tmp_path, callbacks=[LoRAGuard()])
    trainer.fit(module, toys.loader(), weights_only=True)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Byol.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert toys.same(toys.snapshot(again), toys.snapshot(module))
    trainer = toys.trainer(tmp_path, callbacks=[LoRAGuard()])
    trainer.fit(module, toys.loader(), weights_only=True)


def test_a_teacher_that_moved_comes_back_and_is_not_merged_on_disk(tmp_path: Path) -> None:
    module = Pair()
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    inject_lora(module, CONFIG)
    with torch.no_grad():
        dict(module.named_parameters())["target.0.weight"].add_(0.5)
    save_adapter(module, tmp_path / "adapter")
    again = Pair()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(X), module(X))
    assert list(learning_layers(again)) == list(learning_layers(module))
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in module.parameters()]
    with pytest.raises(AdapterFileError, match=r"new base weights under its updates \(target.0\), as of a teacher"):
        merge_files(tmp_path, tmp_path / "adapter", tmp_path.parent / "merged")


def test_a_copy_outside_the_adapted_part_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Mean(toys.Toy):
        lora_root = "net"

        def __init__(self) -> None:
            super().__init__()
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    with caplog.at_level("INFO", logger="lightning.pytorch"):
        Mean().configure_model()
    assert "teacher is a frozen copy of net but not adapted in the same layers" in caplog.text


def test_removing_the_adapters_leaves_nothing_behind() -> None:
    module, plain = Pair(), Pair()
    inject_lora(module, CONFIG)
    remove_lora(module)
    assert [sorted(child.__dict__) for child in module.modules()] == [
        sorted(child.__dict__) for child in plain.modules()
    ]
