"""Checkpoints hold adapters, fully trained modules and buffers only, and resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_lora import LoRAConfig, LoRAMixin
from lightning_lora.files.lightning_checkpoint import CHECKPOINT_KEY
from tests.support import toys
from tests.support.toy_checkpoints import content, saved
from tests.support.toys import Plain, Toy, fit

pytestmark = toys.expected_warnings

FACTORS = [f"net.{layer}.{factor}" for layer in ("first", "second") for factor in ("lora_A", "lora_B")]


def test_checkpoint_holds_the_adapters_only(tmp_path: Path) -> None:
    module = Toy()
    checkpoint = content(saved(tmp_path, module))
    assert list(checkpoint["state_dict"]) == FACTORS
    assert checkpoint[CHECKPOINT_KEY]["tensors"] == {name: list(module.get_parameter(name).shape) for name in FACTORS}
    assert checkpoint[CHECKPOINT_KEY]["config"] == LoRAConfig(rank=2).to_dict()
    assert len(checkpoint[CHECKPOINT_KEY]["base_fingerprint"]) == 32


def test_fully_trained_modules_are_kept_too(tmp_path: Path) -> None:
    module = Toy()
    module.lora = LoRAConfig(rank=2, targets=["first"], trainable=["second"])
    checkpoint = content(saved(tmp_path, module))
    assert list(checkpoint["state_dict"]) == [*FACTORS[:2], "net.second.weight", "net.second.bias"]


def test_optimizer_state_is_keyed_by_name(tmp_path: Path) -> None:
    state = content(saved(tmp_path))["optimizer_states"][0]
    assert list(state["state"]) == FACTORS
    assert [group["params"] for group in state["param_groups"]] == [FACTORS]
    assert state["state"]["net.first.lora_B"]["exp_avg"].shape == (8, 2)


def test_frozen_parameters_in_the_optimizer_do_not_disturb_the_names(tmp_path: Path) -> None:
    class Everything(Toy):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.05)

    whole, half, resumed = Everything(), Everything(), Everything()
    torch.manual_seed(0)
    fit(whole, tmp_path, max_epochs=2)
    torch.manual_seed(0)
    path = saved(tmp_path, half)
    assert sorted(content(path)["optimizer_states"][0]["state"]) == sorted(FACTORS)
    fit(resumed, tmp_path, path, max_epochs=2)
    assert toys.same(toys.snapshot(whole), toys.snapshot(resumed))


def test_optimizer_with_a_parameter_outside_the_module_is_saved(tmp_path: Path) -> None:
    outside = nn.Parameter(torch.zeros(1))

    class Odd(Toy):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([outside, *[p for p in self.parameters() if p.requires_grad]], lr=0.05)

    path = saved(tmp_path, Odd())
    assert content(path)["optimizer_states"][0]["param_groups"][0]["params"] == [0, *FACTORS]
    fit(Odd(), tmp_path, path, max_epochs=2)


def test_resuming_equals_the_uninterrupted_run_bit_for_bit(tmp_path: Path) -> None:
    whole, resumed = Toy(), Toy()
    uninterrupted = fit(whole, tmp_path, max_epochs=2)
    torch.manual_seed(0)
    path = saved(tmp_path, Toy())
    torch.manual_seed(99)
    continued = fit(resumed, tmp_path, path, max_epochs=2)
    assert toys.same(toys.snapshot(whole), toys.snapshot(resumed))
    states = [runner.optimizers[0].state.values() for runner in (uninterrupted, continued)]
    for one, other in zip(*states, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


RELOAD = """
import sys, torch, warnings
warnings.simplefilter("error")
from tests.support.toys import Toy
module = Toy.load_from_checkpoint(sys.argv[1], weights_only=True)
torch.save(module.state_dict(), sys.argv[2])
"""


def test_reload_in_a_fresh_process(tmp_path: Path) -> None:
    module = Toy()
    path = saved(tmp_path, module)
    toys.run_python(RELOAD, path, tmp_path / "state.pt")
    assert toys.same(toys.snapshot(module), content(tmp_path / "state.pt"))


@pytest.mark.parametrize("strict", [None, True, False])
def test_strictness_asked_for_makes_no_difference(strict: bool | None, tmp_path: Path) -> None:
    module = Toy()
    path = saved(tmp_path, module)
    loaded = Toy.load_from_checkpoint(path, weights_only=True, strict=strict)
    assert toys.same(toys.snapshot(module), toys.snapshot(loaded))


def test_model_checkpoint_of_weights_only_is_adapter_only_too(tmp_path: Path) -> None:
    module = Toy()
    keep = ModelCheckpoint(tmp_path / "kept", save_weights_only=True)
    fit(module, tmp_path, callbacks=[keep], enable_checkpointing=True)
    checkpoint = content(Path(keep.best_model_path))
    assert list(checkpoint["state_dict"]) == FACTORS
    assert "optimizer_states" not in checkpoint
    loaded = Toy.load_from_checkpoint(keep.best_model_path, weights_only=True)
    assert toys.same(toys.snapshot(module), toys.snapshot(loaded))


def test_base_weights_in_an_adapter_checkpoint_are_not_taken(tmp_path: Path) -> None:
    module = Toy()
    checkpoint = content(saved(tmp_path, module))
    checkpoint["state_dict"]["net.first.weight"] = torch.full((8, 4), 7.0)
    torch.save(checkpoint, tmp_path / "more.ckpt")
    loaded = Toy.load_from_checkpoint(tmp_path / "more.ckpt", weights_only=True)
    assert toys.same(toys.snapshot(module), toys.snapshot(loaded))


class Normed(LoRAMixin, Plain):
    lora = LoRAConfig(rank=2)

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.norm(x))


def test_buffers_travel(tmp_path: Path) -> None:
    module = Normed()
    path = saved(tmp_path, module)
    assert set(content(path)["state_dict"]) == {
        *FACTORS,
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    loaded = Normed.load_from_checkpoint(path, weights_only=True)
    assert toys.same(toys.snapshot(module), toys.snapshot(loaded))
    assert int(loaded.norm.num_batches_tracked or 0) == 4


def test_net_is_the_same_every_time() -> None:
    assert toys.same(toys.snapshot(toys.Net()), toys.snapshot(toys.Net()))
