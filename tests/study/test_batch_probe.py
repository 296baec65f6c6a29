"""A probe shows the cost of a batch (V15), and says what it cannot probe."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from lightning_lora import BatchProbe, LoRAConfig, LoRAMixin
from lightning_lora.batch.accumulation import fit_to_batch
from lightning_lora.errors import ConfigError, DataError, GradientError, LoRAError
from lightning_lora.study.batch_arms import Arms, compared
from lightning_lora.study.batch_probe_plot import draw_probe
from lightning_lora.study.batch_probe_result import BatchProbeResult, Comparison
from lightning_lora.study.branch import Branch
from lightning_lora.study.row_order import next_rows
from tests.support import toys

pytestmark = toys.expected_warnings

WIDTH = 48


class Student(LoRAMixin):
    """Learns a rank-8 teacher from noisy rows (oracle O1 of research/batch_and_capacity.md)."""

    lora = LoRAConfig(rank=16, targets=["layer"])
    learning_rate = 6e-4

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.layer = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        torch.nn.init.zeros_(self.layer.weight)

    def configure_model(self) -> None:
        torch.manual_seed(self.seed)

    def losses(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return 0.5 * (self.layer(x) - y).square().sum(1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.losses(batch).mean()

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"loss": self.losses(batch)}

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.lora_parameter_groups(self.learning_rate), betas=(0.9, 0.95))


def loader(count: int, seed: int, batch_size: int = 32) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(99)
    teacher = torch.randn(WIDTH, 8, generator=generator) @ torch.randn(8, WIDTH, generator=generator)
    teacher *= 3 / teacher.norm()
    generator.manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=generator)
    return DataLoader(
        TensorDataset(x, x @ teacher.T + 0.5 * torch.randn(count, WIDTH, generator=generator)), batch_size
    )


def snapshot(tmp_path: Path, seed: int = 0, count: int = 1024) -> tuple[Student, dict[str, Any]]:
    module = Student(seed)
    trainer = toys.trainer(tmp_path)
    trainer.fit(module, loader(count, 1000 + seed))
    return module, trainer.optimizers[0].state_dict()


@pytest.mark.slow
def test_four_steps_are_worse_than_64_and_16_are_not_nor_are_64_on_other_rows(tmp_path: Path) -> None:
    """V15: 2,048 rows to each arm, from a snapshot at 32 rows a step.

    `benchmarks/batch_probe.py` has the rates of more seeds: with one order of the data the interval leaves out what
    another order would give, and one in fifteen arms of the same batch is called worse.
    """
    arms, worse, harmless, same = Arms(32, (32, 128, 512), 2048), 0, 0, 0
    for seed in range(10):
        module, state = snapshot(tmp_path, seed, count=4096)
        branch, held_out = Branch(module, state, loader(4096, seed), 512), (loader(256, 7000 + seed), range(256))
        losses = arms.train(branch, range(4096), held_out)
        four, sixteen, _ = compared(losses)
        others = branch.losses_after(range(2048, 4096), 32, 1.0, held_out)
        worse += sixteen.is_worse
        harmless += not four.is_worse
        same += not Comparison.of(32, 32, others[None] - losses[32]).is_worse
    assert worse >= 9
    assert harmless >= 8
    assert same >= 9


def test_a_probe_outside_of_a_run_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    module, state = snapshot(tmp_path)
    before, trainer, random = toys.snapshot(module), module._trainer, torch.get_rng_state()
    moments = [tensor.clone() for tensor in state["state"][0].values()]
    result = BatchProbe(ratios=(1, 4), min_steps=2, min_epoch=0).run(
        module, loader(256, 0), loader(64, 5), optimizer_state=state
    )
    assert toys.same(toys.snapshot(module), before)
    assert module._trainer is trainer
    assert torch.equal(torch.get_rng_state(), random)
    assert all(map(torch.equal, moments, state["state"][0].values()))
    assert list(result.losses) == [32, 128]
    assert (result.num_rows, result.num_held_out) == (256, 64)


def test_a_fresh_module_is_probed_without_being_built() -> None:
    module = Student()
    probe = BatchProbe(ratios=(1, 2), min_steps=1, min_epoch=0)
    result = probe.run(module, loader(64, 0), loader(64, 5))
    assert list(module.state_dict()) == ["layer.weight"]
    assert probe.run(module, loader(64, 0), loader(64, 5)).losses == result.losses
    assert result.losses[32] < result.start_loss


class Deep(Student):
    """With dropout, so that a branch draws, and a loss of a whole batch only."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return torch.nn.functional.dropout(self.losses(batch), 0.5).mean()

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"loss": self.losses(batch).mean()}


def test_a_module_that_gives_the_loss_of_a_batch_is_scored_row_by_row() -> None:
    probe = BatchProbe(ratios=(1, 2), min_steps=2, min_epoch=0)
    one, other = (probe.run(kind(), loader(128, 0), loader(16, 5)) for kind in (Student, Deep))
    assert other.start_loss == pytest.approx(one.start_loss, rel=1e-6)
    assert other.num_held_out == 16
    assert other.losses != one.losses


def test_the_largest_batch_is_not_blamed_for_a_second_decay_below_the_first() -> None:
    def fitted(ratio: float) -> tuple[float, float]:
        group = {"lr": 1.0, "betas": (0.9, 0.95)}
        fit_to_batch(group, 1.0, ratio)
        return group["lr"], group["betas"][1]

    assert fitted(0.25) == (0.5, 0.95**0.25)
    assert fitted(4) == (2.0, 0.95)


def test_the_rate_is_constant_and_cools_down_in_the_last_fifth(tmp_path: Path) -> None:
    seen: list[float] = []

    class Watched(Student):
        def optimizer_step(self, *arguments: Any, **options: Any) -> None:
            super().optimizer_step(*arguments, **options)
            seen.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    branch = Branch(Watched(), None, loader(320, 0), 32, rate_factor=0.5)
    branch.losses_after(range(320), 32, 4.0, (loader(4, 5), range(4)))
    assert seen == pytest.approx([6e-3] * 8 + [4e-3, 2e-3])


def test_losses_of_several_orders_have_an_interval_over_orders_and_rows() -> None:
    """Crossed effects of 0.3 and 1.0 in 40 orders and 400 rows: the error is that of both means."""
    generator = torch.Generator().manual_seed(0)
    orders = 0.3 * torch.randn(40, 1, generator=generator, dtype=torch.float64)
    rows = torch.randn(1, 400, generator=generator, dtype=torch.float64)
    both = Comparison.of(1, 2, orders + rows)
    assert both.error == pytest.approx(math.sqrt(0.3**2 / 40 + 1 / 400), rel=0.1)
    assert Comparison.of(1, 2, rows).error == pytest.approx(1 / math.sqrt(400), rel=0.1)


def result(*worse: tuple[int, int], **changes: Any) -> BatchProbeResult:
    pairs = [(8, 16), (8, 32), (16, 32)]
    comparisons = tuple(Comparison(s, b, 1.0 if (s, b) in worse else 0.0, 0.1) for s, b in pairs)
    losses = {8: 1.0, 16: 1.0, 32: 1.0}
    return BatchProbeResult(
        **(
            {"start_loss": 2.0, "num_seeds": 1}
            | {"batch_rows": 16, "num_rows": 64, "num_held_out": 512, "losses": losses, "comparisons": comparisons}
            | changes
        )
    )


def test_the_largest_harmless_batch_is_below_the_first_that_is_worse() -> None:
    assert (result().largest_harmless, result().bound) == (32, "at least")
    assert (result((16, 32)).largest_harmless, result((16, 32)).bound) == (16, "")
    assert (result((8, 16)).largest_harmless, result((8, 16)).bound) == (8, "at most")
    assert result((8, 32)).largest_harmless == 16
    assert result((8, 32), noise_scale=4.0).calibration == 4.0
    assert result((8, 32)).calibration is None


def test_a_small_difference_is_none_however_sure_it_is() -> None:
    assert not Comparison(1, 2, 0.004, 1e-6).is_worse
    assert Comparison(1, 2, 0.006, 1e-6).is_worse
    assert not Comparison(1, 2, 0.006, 0.004).is_worse


def test_the_table_says_what_was_found_and_on_how_little() -> None:
    text = str(result((16, 32), num_held_out=54, step=100))
    assert "batch probe after step 100: 64 rows to each of 3 batches, loss on 54 held-out rows (2.0000 before)" in text
    assert "      16 rows a step,    4 steps: 1.0000  (the run's own)" in text
    assert "  32 against 16: +1.0000 +- 0.2000 nats, worse" in text
    assert "  16 against 8: +0.0000 +- 0.2000 nats, no difference seen" in text
    assert "54 held-out rows are few" in text
    assert text.endswith("largest batch without measurable loss: 16 rows a step")
    assert str(result()).endswith("largest batch without measurable loss: at least 32 rows a step")


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_nothing_is_called_a_penalty_before_the_third_order_of_the_data(num_seeds: int) -> None:
    text = str(
        result(num_seeds=num_seeds, full_losses={8: 1.0, 16: 1.0, 32: 1.0}, extra_cost=Comparison(8, 32, 1, 0.1))
    )
    assert "[LoRA - full](32) - [LoRA - full](8): +1.0000 +- 0.2000 nats" in text
    assert ("a penalty of LoRA for the large batch" in text) == (num_seeds == 3)
    assert ("penalty" in text) == (num_seeds == 3)


def test_full_fine_tuning_is_compared_from_the_same_weights() -> None:
    class Slow(Student):
        lora = LoRAConfig(rank=16, targets=["layer"], lr_multiplier=1.0)

    probe = BatchProbe(ratios=(1, 4), min_steps=2, min_epoch=0, full_ft=True, num_seeds=3)
    found = probe.run(Slow(), loader(256, 0), loader(64, 5))
    assert found.full_losses is not None
    assert found.extra_cost is not None
    assert found.full_losses.keys() == found.losses.keys()
    assert all(loss < found.start_loss for loss in found.full_losses.values())
    means = {batch: found.losses[batch] - found.full_losses[batch] for batch in found.losses}
    assert found.extra_cost.difference == pytest.approx(means[128] - means[32], abs=1e-9)


def test_a_result_is_read_back_as_it_was_and_drawn(tmp_path: Path) -> None:
    found = result((16, 32), noise_scale=3.5, step=7, full_losses={8: 1.0, 16: 1.1, 32: 1.2}, seconds=1.5)
    found.save(tmp_path / "batch_probe.json")
    assert BatchProbeResult.load(tmp_path / "batch_probe.json") == found
    assert json.loads((tmp_path / "batch_probe.json").read_text())["calibration"] == 16 / 3.5
    draw_probe(found, tmp_path / "probe.png")
    assert (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found | {"format": "other"},
        lambda found: {name: value for name, value in found.items() if name != "losses"},
        lambda found: found | {"comparisons": found["comparisons"][:1]},
        lambda found: found | {"noise_scale": -1.0},
        lambda found: found | {"losses": 3},
        lambda found: [found],
    ],
)
def test_a_damaged_result_is_refused(damage: Any, tmp_path: Path) -> None:
    path = tmp_path / "batch_probe.json"
    result().save(path)
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=r"batch_probe\.json is not a whole result of a batch probe"):
        BatchProbeResult.load(path)
    path.write_text("{")
    with pytest.raises(DataError, match="is no whole result"):
        BatchProbeResult.load(path)
    with pytest.raises(DataError, match=r"none\.json cannot be read: No such file"):
        BatchProbeResult.load(tmp_path / "none.json")


def test_the_next_rows_are_those_of_the_sampler_and_used_ones_come_last() -> None:
    data = TensorDataset(torch.arange(12))
    shuffled = DistributedSampler(data, num_replicas=1, rank=0, seed=5)
    shuffled.set_epoch(2)
    order = list(shuffled)
    shuffled.set_epoch(0)
    assert next_rows(DataLoader(data, 4, sampler=shuffled), epoch=2, num_batches=1) == [*order[4:], *order[:4]]
    assert shuffled.epoch == 0
    assert next_rows(DataLoader(data, 4), num_batches=2) == [8, 9, 10, 11, *range(8)]
    state = torch.get_rng_state()
    assert sorted(next_rows(DataLoader(data, 4, shuffle=True))) == list(range(12))
    assert torch.equal(state, torch.get_rng_state())


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(loader(8, 0).dataset)  # pyright: ignore[reportArgumentType]


class Blind(Student):
    predict_step = LightningModule.predict_step


class Nameless(Student):
    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return self.losses(batch)


class Bare(Student):
    lora = None


class Twice(Student):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([part], 0.1) for name, part in self.named_parameters() if "lora_" in name]


class ByHand(Student):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Idle(Student):
    learning_rate = 1e-30

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([part for part in self.parameters() if part.requires_grad], 0.0)


def probe(module: type[Student] = Student, rows: int = 256, held_out: Any = None, **options: Any) -> None:
    settings: dict[str, Any] = {"ratios": (1, 2), "min_steps": 2, "min_epoch": 0}
    batch_rows = options.pop("batch_rows", None)
    train = options.pop("train", loader(rows, 0))
    held_out = loader(8, 5) if held_out is None else held_out
    BatchProbe(**(settings | options)).run(module(), train, held_out, batch_rows)


REFUSED: list[tuple[dict[str, Any], type[LoRAError], str]] = [
    ({"min_steps": 5}, DataError, r"5 steps of 64 rows needs 320 rows, 256 are there: lower min_steps to 4, or leave"),
    ({"rows": 40}, DataError, r"2 steps of 64 rows needs 128 rows, 40 are there: leave out the largest ratio"),
    ({"batch_rows": 1, "ratios": (0.25, 1)}, ConfigError, r"a batch of 1 rows has no 0\.25th part"),
    ({"batch_rows": 1, "ratios": (1, 1.2)}, ConfigError, r"make one batch: a probe compares two"),
    ({"ratios": (1,)}, ConfigError, r"ratios must be two positive numbers or more, got \[1\]"),
    ({"min_steps": 0}, ConfigError, "min_steps and num_seeds must be 1 at least"),
    ({"at": 1.5}, ConfigError, r"at must be a fraction of the steps below 1, or a whole number of them, got 1\.5"),
    ({"held_out": loader(1, 0)}, DataError, "on held-out rows, 1 of which are there"),
    ({"held_out": DataLoader(Endless())}, DataError, r"the validation data are an iterable dataset \(Endless\)"),
    ({"train": DataLoader(Endless())}, DataError, r"the training data are an iterable dataset \(Endless\)"),
    ({"train": [loader(8, 0)]}, DataError, r"the training data are a list; a probe takes single rows"),
    ({"module": Blind}, ConfigError, r"let Blind\.predict_step return a mapping with their \"loss\" in nats"),
    ({"module": Nameless}, ConfigError, r"let Nameless\.predict_step return a mapping with their \"loss\" in nats"),
    ({"module": ByHand}, ConfigError, "ByHand has 1 and steps by itself"),
    ({"module": Idle}, ConfigError, "the learning rate is 0 here"),
    (
        {"module": Bare, "full_ft": True},
        ConfigError,
        "full_ft compares LoRA with full fine-tuning: Bare has no adapters",
    ),
]


@pytest.mark.parametrize(("settings", "error", "message"), REFUSED)
def test_what_cannot_be_probed_is_refused(settings: dict[str, Any], error: type[LoRAError], message: str) -> None:
    with pytest.raises(error, match=message):
        probe(**settings)


def test_a_branch_that_diverges_is_no_harmless_batch() -> None:
    class Wild(Student):
        learning_rate = 1e30

    with pytest.raises(GradientError, match="the branch of 32 rows a step diverged: its held-out loss is not finite"):
        probe(Wild)
