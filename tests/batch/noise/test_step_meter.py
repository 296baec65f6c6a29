"""Samples of a step under every setting that can be measured, and one clear message where it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_lora.batch.noise.sample_source import unsupported_strategy
from lightning_lora.files.events import read_events
from tests.support import tiny_models, toys
from tests.support.metered import expected, gradients_of, measure
from tests.support.monitored import Double, Samples, fit

pytestmark = [*toys.expected_warnings, *toys.monitor_warnings]


class Still(Double):
    """Trains with any optimizer at rate zero, so that every step can be computed by hand."""

    optimizer: Any = SGD
    options: dict[str, Any] = {}

    def configure_model(self) -> None:
        super().configure_model()
        tiny_models.wake(self, size=0.5)

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer([p for p in self.parameters() if p.requires_grad], lr=0.0, **self.options)


class Adaptive(Still):
    optimizer = Adam
    # With beta2 = 0.5 the second moment counts after two steps.
    options = {"betas": (0.9, 0.5), "eps": 1e-3}


@pytest.mark.parametrize("accumulate", [2, 1])
def test_adams_metric_is_that_of_the_moment_before_the_step(accumulate: int, tmp_path: Path) -> None:
    """Samples are micro-batches with accumulation, and rows without."""
    batch_size = 8 // accumulate
    module, loader = Adaptive(), toys.loader(24, batch_size)
    samples = measure(tmp_path, module, loader, accumulate, measures_adam=True)
    assert [set(sample) for sample in samples] == [{"adapter"}, {"adapter"}, {"adapter", "adam"}]
    parts = list(toys.loader(24, batch_size if accumulate > 1 else 1))
    gradients = gradients_of(module, parts).unflatten(0, (3, -1))
    first, second, _ = gradients.mean(1)
    moment = (0.25 * first.square() + 0.5 * second.square()) / 0.75
    size = batch_size if accumulate > 1 else 1
    assert samples[2]["adapter"] == expected(gradients[2], size)
    assert samples[2]["adam"] == expected(gradients[2] / (moment.sqrt() + 1e-3), size)


class SteepestDescent(SGD):
    """Has betas, but no second moment."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr, momentum=0.9)
        self.param_groups[0]["betas"] = (0.9, 0.99)


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [(SGD, "SGD has no betas: use Adam"), (SteepestDescent, "SteepestDescent keeps no exp_avg_sq: use Adam")],
)
def test_an_optimizer_unlike_adam_is_measured_without_its_metric(
    optimizer: type[Optimizer], reason: str, tmp_path: Path
) -> None:
    module: Any = Still()
    module.optimizer = optimizer
    with pytest.warns(UserWarning, match=f"the noise scale is not measured as Adam scales it: {reason}") as warned:
        samples = measure(tmp_path, module, toys.loader(24, 4), 2, measures_adam=True)
    assert [set(sample) for sample in samples] == [{"adapter"}] * 3
    assert sum("as Adam scales it" in str(warning.message) for warning in warned) == 1


def of_weights(module: Any) -> Any:
    """The sample of all 16 rows in the frozen weights."""
    weights = [module.net.first.weight, module.net.second.weight]
    for parameter in module.parameters():
        parameter.requires_grad_(any(parameter is weight for weight in weights))
    return expected(gradients_of(module, list(toys.loader(16, 1))), 1)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_small_frozen_weights_are_measured_exactly(accumulate: int, tmp_path: Path) -> None:
    module = Still()
    (sample,) = measure(tmp_path, module, toys.loader(16, 16 // accumulate), accumulate, frozen_weights_every=1)
    assert sample["weight"] == of_weights(module)


class Wide(Still):
    def __init__(self) -> None:
        super().__init__()
        self.net = toys.Net(width=96)


def test_sketches_of_large_frozen_weights_keep_their_noise_scale_on_average(tmp_path: Path) -> None:
    """The same rows in every step, so only the sketches differ from one to the next."""
    module, trainer = Wide(), {"max_epochs": 60}
    samples = measure(tmp_path, module, toys.loader(16, 16), 1, trainer, frozen_weights_every=1)
    found = torch.tensor([sample["weight"][:2] for sample in samples], dtype=torch.float64)
    assert len(found.unique(dim=0)) == 60
    assert found.mean(0).tolist() == pytest.approx(of_weights(module).expected[:2], rel=0.1)


def test_the_frozen_weights_are_measured_as_seldom_as_asked(tmp_path: Path) -> None:
    samples = measure(tmp_path, Still(), toys.loader(32, 4), 1, frozen_weights_every=3)
    assert ["weight" in sample for sample in samples] == [True, False, False] * 2 + [True, False]


def test_frozen_weights_that_hooks_do_not_see_are_left_out_and_the_rest_is_measured(tmp_path: Path) -> None:
    module: Any = Still()
    module.lora = {"rank": 1, "targets": ["first"], "trainable": ["second"]}
    with pytest.warns(
        UserWarning, match=r"frozen weights is not measured: per-row gradients .* net\.second\.weight is trained too"
    ):
        samples = measure(tmp_path, module, toys.loader(16, 4), 2, frozen_weights_every=1)
    assert [set(sample) for sample in samples] == [{"adapter"}] * 2


class Manual(toys.ByHand, Still):
    """Calls a backward pass for each half of a batch."""

    num_passes = 2

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        for x, y in zip(*(part.chunk(self.num_passes) for part in batch), strict=True):
            self.manual_backward(super().training_step([x, y], batch_idx) / self.num_passes)
        optimizer.step()


def test_manual_optimisation_needs_no_help(tmp_path: Path) -> None:
    samples = measure(tmp_path, Manual(), toys.loader(16, 8))
    module: Any = Still()
    module.configure_model()
    gradients = gradients_of(module, list(toys.loader(16, 4))).unflatten(0, (2, 2))
    assert [sample["adapter"] for sample in samples] == [expected(step, 4) for step in gradients]


def test_manual_optimisation_leaves_the_frozen_weights_out(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="frozen weights is not measured: with manual optimization it is unknown"):
        samples = measure(tmp_path, Manual(), toys.loader(16, 8), frozen_weights_every=1)
    assert [set(sample) for sample in samples] == [{"adapter"}] * 2


def test_one_backward_pass_by_hand_is_said_to_be_too_few(tmp_path: Path) -> None:
    module = Manual()
    module.num_passes = 1
    with pytest.warns(UserWarning, match="one backward pass in a step of manual optimization") as warned:
        assert measure(tmp_path, module, toys.loader(16, 8)) == [{}, {}]
    assert sum("one backward pass" in str(warning.message) for warning in warned) == 1


@pytest.fixture
def tensor_parallel() -> Iterator[ModelParallelStrategy]:
    """The strategy of one of two processes that split the layers; the mesh can be built without the other."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    strategy = ModelParallelStrategy(1, 2)
    names = ("data_parallel", "tensor_parallel")
    strategy._device_mesh = torch.distributed.init_device_mesh("cpu", (1, 2), mesh_dim_names=names)
    yield strategy
    torch.distributed.destroy_process_group()


def test_strategies_that_show_no_micro_batch_are_named(tensor_parallel: ModelParallelStrategy) -> None:
    assert "tensor_parallel_size=1" in str(unsupported_strategy(tensor_parallel))
    assert "FSDP1 shards gradients" in str(unsupported_strategy(FSDPStrategy()))
    # Constructing the strategy needs the library; only its type matters here.
    assert "DeepSpeed accumulates inside its engine" in str(
        unsupported_strategy(DeepSpeedStrategy.__new__(DeepSpeedStrategy))
    )


class TwoOptimizers(Manual):
    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        return [SGD(trained[:2], lr=0.0), SGD(trained[2:], lr=0.0)]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Takes no step."""


class Fused(toys.Toy):
    def configure_optimizers(self) -> Optimizer:
        return Adam([p for p in self.parameters() if p.requires_grad], lr=0.1, fused=True)


def scaled() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))  # pyright: ignore


@pytest.mark.parametrize(
    ("module", "options", "reason"),
    [
        (TwoOptimizers, {}, "gradients of a step are known for one optimizer only, and the module has 2"),
        (Fused, {"plugins": [scaled()]}, "Adam unscales the gradients inside its step"),
    ],
)
def test_what_cannot_be_measured_is_said_once_and_the_run_goes_on(
    module: Any, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=f"the batch-size monitor measures nothing: {reason}") as warned:
        assert not fit(tmp_path, 16, 4, 1, module(), **options).samples
    assert sum("monitor measures nothing" in str(warning.message) for warning in warned) == 1


class AllMetrics(Samples):
    measures_adam, frozen_weights_every = True, 3


def test_the_monitor_logs_all_metrics_and_goes_on_with_them(tmp_path: Path) -> None:
    """A resumed run keeps its samples; lambda is the noise scale of the frozen weights over that of the adapters."""

    def run(name: str, epochs: int, path: Path | None = None) -> Trainer:
        trainer = toys.trainer(tmp_path / name, max_epochs=epochs, callbacks=[AllMetrics()])
        trainer.fit(Adaptive(), toys.loader(32, 8), ckpt_path=None if path is None else str(path))
        return trainer

    run("half", 2).save_checkpoint(tmp_path / "half.ckpt")
    half = [event for event in read_events(tmp_path / "half") if event["event"] == "noise_scale"]
    assert ["gns/adam" in event for event in half] == [False] * 2 + [True] * 6
    assert ["gns/weight" in event for event in half] == [True, False, False] * 2 + [True, False]
    for event in half[::3]:
        assert event["gns/lambda"] == pytest.approx(event["gns/weight"] / event["gns/value"])
    assert half[0]["gns/lambda_conclusive"] == half[0]["gns/weight_conclusive"] == 0
    run("whole", 4)
    whole = list(read_events(tmp_path / "whole"))
    run("resumed", 4, tmp_path / "half.ckpt")
    assert list(read_events(tmp_path / "resumed"))[-1]["gns/adam"] == whole[-1]["gns/adam"]
