"""``init="gradient"`` in a run: from its very first batches, before the first step, once, and without another trace."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_lora import ConfigError, GradientError, LoRAConfig, inject_lora, lora_layers
from lightning_lora.callbacks import LoRA, LoRAGuard
from lightning_lora.lora.gradient_start import gradient_init
from tests.support import toys
from tests.support.toys import Plain, Toy

pytestmark = toys.expected_warnings

CONFIG = LoRAConfig(rank=1, init="gradient", init_batches=3)


class Disturbing(Plain):
    """Draws random numbers, has running statistics and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.3), nn.BatchNorm1d(4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(self.drop(self.norm(x + numpy.random.rand() + random.random())))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


class Noting(Callback):
    """Notes batches, random numbers and the state of the module as they are before each step."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.states: list[Any] = []
        self.factors: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.batches:
            self.factors = {n: p.detach().clone() for n, p in pl_module.named_parameters() if "lora_" in n}
        self.batches.append(batch)
        state = [torch.get_rng_state(), torch.tensor(random.getstate()[1]), torch.from_numpy(legacy_words())]
        self.states.append((*state, pl_module.calls if hasattr(pl_module, "calls") else 0))


def legacy_words() -> Any:
    state: Any = numpy.random.get_state(legacy=False)
    return numpy.append(state["state"]["key"].astype("int64"), state["state"]["pos"])


class Stream(IterableDataset[Any]):
    """Rows that can be read only once, and are drawn as they are read."""

    def __init__(self, count: int = 8) -> None:
        self.generator, self.count = torch.Generator().manual_seed(5), count

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.count):
            yield torch.randn(4, generator=self.generator), torch.randn(2, generator=self.generator)


class Iterable:
    """A loader of somebody else's."""

    def __iter__(self) -> Iterator[Any]:
        return iter(toys.loader())


class Noisy(TensorDataset):
    """Rows with noise from the global generator."""

    def __getitem__(self, index: Any) -> Any:
        x, y = super().__getitem__(index)
        return x + torch.rand(4), y


def own_generator() -> DataLoader[Any]:
    return DataLoader(toys.rows(), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(3))


LOADERS: dict[str, Any] = {
    "in order": toys.loader,
    "shuffled": lambda: DataLoader(toys.rows(), batch_size=2, shuffle=True),
    "own generator": own_generator,
    "augmented": lambda: DataLoader(Noisy(*toys.rows().tensors), batch_size=2, shuffle=True),
    "workers": lambda: DataLoader(toys.rows(), batch_size=2, shuffle=True, num_workers=1, persistent_workers=True),
    "stream": lambda: DataLoader(Stream(), batch_size=2),
    "short stream": lambda: DataLoader(Stream(2), batch_size=2),
    "any iterable": lambda: Iterable(),
}


def run(folder: Path, module: LightningModule, loader: Any, *callbacks: Callback, **options: Any) -> Noting:
    noting = Noting()
    toys.trainer(folder, callbacks=[*callbacks, noting], **options).fit(module, loader)
    return noting


def seeded(kind: type[LightningModule], config: LoRAConfig) -> Any:
    seed_everything(1, verbose=False)
    module: Any = kind()
    module.lora = config
    return module


def as_by_hand(batches: list[Any], config: LoRAConfig = CONFIG) -> dict[str, Tensor]:
    """Factors that `gradient_init` gives the toy on these batches."""
    module = Toy()
    inject_lora(module, config)
    gradient_init(module, lambda batch: (module(batch[0]) - batch[1]).square().mean(), batches)
    return {name: p.detach() for name, p in module.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("name", LOADERS)
def test_the_start_is_that_of_the_first_batches_which_training_still_gets(name: str, tmp_path: Path) -> None:
    plain = run(tmp_path, seeded(Toy, LoRAConfig(rank=1)), LOADERS[name]())
    noted = run(tmp_path, seeded(Toy, CONFIG), LOADERS[name]())
    assert len(noted.batches) == len(plain.batches)
    for one, other in zip(noted.batches, plain.batches, strict=True):
        assert all(map(torch.equal, one, other))
    for key, factor in as_by_hand(noted.batches[:3]).items():
        torch.testing.assert_close(noted.factors[key], factor, msg=key)


def test_two_loaders_at_once_are_read_once(tmp_path: Path) -> None:
    class Both(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["a"], 0) + super().training_step(batch["b"], 0)

    def loaders() -> Any:
        return {"a": LOADERS["shuffled"](), "b": LOADERS["stream"]()}

    plain = run(tmp_path, seeded(Both, LoRAConfig(rank=1)), loaders())
    noted = run(tmp_path, seeded(Both, CONFIG), loaders())
    pairs = list(zip(noted.batches, plain.batches, strict=True))
    assert all(torch.equal(one[key][0], other[key][0]) for one, other in pairs for key in "ab")
    assert any(bool(factor.any()) for name, factor in noted.factors.items() if name.endswith("lora_B"))


def test_random_numbers_buffers_attributes_and_logs_stay_as_without_it(tmp_path: Path) -> None:
    notes, modules = [], []
    for init in ("default", "gradient"):
        seed_everything(1, verbose=False)
        module = Disturbing()
        config = LoRAConfig(rank=1, init=init, dropout=0.1)
        notes.append(run(tmp_path, module, toys.loader(), LoRA(config), LoRAGuard()))
        modules.append(module)
    first, other = (note.states[0] for note in notes)
    assert all(map(torch.equal, first[:3], other[:3]))
    assert first[3] == other[3] == 0
    assert modules[0].norm.num_batches_tracked == modules[1].norm.num_batches_tracked == 4
    assert torch.equal(modules[0].norm.running_mean, modules[1].norm.running_mean)


def test_all_batches_are_used_where_there_are_fewer(tmp_path: Path) -> None:
    config = LoRAConfig(rank=1, init="gradient", init_batches=100)
    noted = run(tmp_path, seeded(Toy, config), toys.loader(), limit_train_batches=2)
    for key, factor in as_by_hand(noted.batches, config).items():
        torch.testing.assert_close(noted.factors[key], factor, msg=key)


def test_the_run_says_so_and_its_outputs_start_as_those_of_the_base(tmp_path: Path, caplog: Any) -> None:
    module, x = seeded(Toy, CONFIG), torch.randn(5, 4)
    expected = module(x)
    with caplog.at_level("INFO"):
        run(tmp_path, module, toys.loader(), max_steps=1, limit_train_batches=1)
    assert "lora: 2 layers start along the gradient of the first 1 batches" in caplog.text
    started = seeded(Toy, CONFIG)
    run(tmp_path, started, toys.loader(), Frozen())
    torch.testing.assert_close(started(x), expected)
    assert all(layer.lora_B.any() for layer in lora_layers(started).values())


class Frozen(Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"] = 0.0


def trained(folder: Path, steps: int, ckpt_path: str | None = None) -> Toy:
    module = seeded(Toy, CONFIG)
    trainer = toys.trainer(folder, max_epochs=-1, max_steps=steps)
    trainer.fit(module, DataLoader(toys.rows(), batch_size=2, shuffle=True), ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return module


def test_resume_is_exact_and_does_not_start_again(tmp_path: Path, caplog: Any) -> None:
    whole = trained(tmp_path, 6)
    trained(tmp_path, 3)
    caplog.clear()
    with caplog.at_level("INFO"):
        resumed = trained(tmp_path, 6, str(tmp_path / "3.ckpt"))
    assert "along the gradient" not in caplog.text
    assert toys.same(toys.snapshot(whole), toys.snapshot(resumed))


def test_a_second_fit_goes_on_with_the_trained_adapters(tmp_path: Path, caplog: Any) -> None:
    module = trained(tmp_path, 3)
    before = toys.snapshot(module)
    caplog.clear()
    with caplog.at_level("INFO"):
        run(tmp_path, module, toys.loader(), Frozen())
    assert "along the gradient" not in caplog.text
    assert toys.same(toys.snapshot(module), before)


def test_a_search_for_a_rate_starts_so_too_and_the_run_after_it_starts_anew(tmp_path: Path) -> None:
    starts = []

    class Searched(Toy):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.lora_parameter_groups(0.05))

        def on_train_start(self) -> None:
            starts.append({name: p.detach().clone() for name, p in self.named_parameters() if "lora_" in name})

    module = seeded(Searched, CONFIG)
    module.lr = 0.05
    trainer = toys.trainer(tmp_path)
    Tuner(trainer).lr_find(module, toys.loader(), num_training=5, update_attr=False)
    assert all(not layer.lora_B.any() for layer in lora_layers(module).values())
    trainer.fit(module, toys.loader())
    assert len(starts) == 2
    for key, factor in as_by_hand(list(toys.loader())[:3]).items():
        torch.testing.assert_close(starts[0][key], factor, msg=key)
        torch.testing.assert_close(starts[1][key], factor, msg=key)


def test_manual_optimization_is_refused_before_anything_is_adapted(tmp_path: Path) -> None:
    module = seeded(Toy, CONFIG)
    module.automatic_optimization = False
    with pytest.raises(ConfigError, match=r"Toy steps its optimizers itself: call .*gradient_init before fit"):
        toys.fit(module, tmp_path)
    assert not lora_layers(module)


def test_a_loss_that_is_not_a_number_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(torch.full((4, 4), float("nan")), torch.zeros(4, 2)), batch_size=2)
    with pytest.raises(GradientError, match="NaN or infinite in 2 of 2 layers"):
        toys.trainer(tmp_path).fit(seeded(Toy, CONFIG), loader)


@pytest.mark.parametrize("number", [0, 2.5, True])
def test_the_number_of_batches_must_be_a_whole_number_above_zero(number: Any) -> None:
    with pytest.raises(ConfigError, match="init_batches must be"):
        LoRAConfig(init="gradient", init_batches=number)
