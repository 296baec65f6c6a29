"""Checkpoints hold adapters only, resume exactly, and are refused where they do not belong."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import (
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    LoRAConfig,
    LoRAMixin,
    lora_layers,
    merge_lora,
)
from lightning_lora.checkpoints.contents import refuse_adapter
from lightning_lora.files.lightning_checkpoint import CHECKPOINT_KEY
from tests.support import toys
from tests.support.toys import Net, Plain, Toy

pytestmark = toys.expected_warnings

FACTORS = [f"net.{layer}.{factor}" for layer in ("first", "second") for factor in ("lora_A", "lora_B")]


def fit(module: LightningModule, folder: Path, ckpt_path: Path | None = None, **options: Any) -> Trainer:
    runner = toys.trainer(folder, **options)
    runner.fit(module, toys.loader(), ckpt_path=ckpt_path, weights_only=True)
    return runner


def saved(folder: Path, module: LightningModule | None = None, **options: Any) -> Path:
    path = folder / "a.ckpt"
    fit(Toy() if module is None else module, folder, **options).save_checkpoint(path)
    return path


def content(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


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


def other_rank() -> LightningModule:
    module = Toy()
    module.lora = LoRAConfig(rank=1)
    return module


def other_targets() -> LightningModule:
    module = Toy()
    module.lora = LoRAConfig(rank=2, targets=["first"])
    return module


def without_lora() -> LightningModule:
    module = Toy()
    module.lora = None
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


@pytest.mark.parametrize("manifest", [{}, {"format": 1}, [], "text"])
def test_damaged_manifest_is_refused(manifest: Any, tmp_path: Path) -> None:
    checkpoint = content(saved(tmp_path)) | {CHECKPOINT_KEY: manifest}
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    with pytest.raises(AdapterFileError, match="'lightning_lora' entry is no manifest"):
        Toy.load_from_checkpoint(tmp_path / "bad.ckpt", weights_only=True)


def test_newer_format_is_refused(tmp_path: Path) -> None:
    checkpoint = content(saved(tmp_path))
    checkpoint[CHECKPOINT_KEY]["format"] = 99
    torch.save(checkpoint, tmp_path / "new.ckpt")
    with pytest.raises(AdapterFileError, match="format 99 is newer than 1: update lightning-lora"):
        Toy.load_from_checkpoint(tmp_path / "new.ckpt", weights_only=True)


def test_base_weights_in_an_adapter_checkpoint_are_not_taken(tmp_path: Path) -> None:
    module = Toy()
    checkpoint = content(saved(tmp_path, module))
    checkpoint["state_dict"]["net.first.weight"] = torch.full((8, 4), 7.0)
    torch.save(checkpoint, tmp_path / "more.ckpt")
    loaded = Toy.load_from_checkpoint(tmp_path / "more.ckpt", weights_only=True)
    assert toys.same(toys.snapshot(module), toys.snapshot(loaded))


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return Path.write_text, (self.sentinel, "run")


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


def test_plain_checkpoint_into_a_module_without_lora_is_not_our_business(tmp_path: Path) -> None:
    path = saved(tmp_path, without_lora())
    checkpoint = content(path)
    refuse_adapter(checkpoint)
    assert CHECKPOINT_KEY not in checkpoint


class Sized(Toy):
    """What the tuner asks of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 2
        self.lr = 0.05

    def train_dataloader(self) -> DataLoader[Any]:
        return toys.loader(count=16, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return toys.loader(count=2)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class CountSteps(Callback):
    def __init__(self) -> None:
        self.first: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.first = trainer.global_step


@pytest.mark.parametrize("tool", ["scale_batch_size", "lr_find"])
def test_the_tuner_leaves_base_adapters_and_step_counter_unchanged(tool: str, tmp_path: Path) -> None:
    module = Sized()
    module.configure_model()
    before, steps = toys.snapshot(module), CountSteps()
    runner = toys.trainer(tmp_path, callbacks=[steps])
    if tool == "scale_batch_size":
        Tuner(runner).scale_batch_size(module, max_trials=2, steps_per_trial=2)
        assert module.batch_size > 2
    else:
        Tuner(runner).lr_find(module, num_training=5)
    assert toys.same(before, toys.snapshot(module))
    assert len(lora_layers(module)) == 2
    runner.fit(module)
    assert steps.first == 0
    assert all(toys.moved(module))
    assert toys.same(toys.base_of(Toy()), toys.base_of(module))


SHARDED = """
import sys, torch
from pathlib import Path
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_lora.sharding import shard_lora
from tests import toys

class Sharded(toys.Toy):
    def configure_model(self):
        if not hasattr(self, "sharded"):
            self.apply_lora()
            shard_lora(self.net, self.device_mesh)
            self.sharded = True

def run(epochs, ckpt_path=None):
    torch.manual_seed(0)
    module = Sharded()
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    trainer = toys.trainer(Path(sys.argv[1]), max_epochs=epochs, strategy=strategy)
    trainer.fit(module, toys.loader(), ckpt_path=ckpt_path, weights_only=True)
    return module, trainer

whole, _ = run(2)
_, half = run(1)
half.save_checkpoint(Path(sys.argv[1]) / "shards")
resumed, _ = run(2, Path(sys.argv[1]) / "shards")
for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
    assert torch.equal(one.full_tensor(), other.full_tensor())
print("same")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_a_checkpoint_in_shards_is_left_whole_and_resumes(tmp_path: Path) -> None:
    assert ModelParallelStrategy()._save_distributed_checkpoint  # the default of Lightning
    assert "same" in toys.run_python(SHARDED, tmp_path).stdout


def test_net_is_the_same_every_time() -> None:
    assert toys.same(toys.snapshot(Net()), toys.snapshot(Net()))
