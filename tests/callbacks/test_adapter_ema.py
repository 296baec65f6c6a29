"""Only trained weights are averaged, as torch averages them, and a resumed run has the same average."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lightning_lora import LoRAConfig, load_adapter
from lightning_lora.callbacks import AdapterCheckpoint, AdapterEMA, LoRA
from lightning_lora.errors import ConfigError
from tests.support import resuming, toys
from tests.support.resuming import DiceyFull, DiceyLoRA, unlike
from tests.support.toys import Plain, Toy

pytestmark = [*toys.expected_warnings]

DECAY = 0.6


class Steps(Callback):
    """Records the trained weights after every step, during validation and after it."""

    def __init__(self) -> None:
        self.trained: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []
        self.after_validation: list[dict[str, Tensor]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.trained.append(trained(pl_module))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.validated.append(trained(pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.after_validation.append(trained(pl_module))


def trained(module: LightningModule) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def held(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def fit(module: LightningModule, folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    trainer = toys.trainer(folder, callbacks=list(callbacks), **options)
    trainer.fit(module, toys.loader(), toys.loader(4))
    return trainer


def torchs(steps: list[dict[str, Tensor]], decay: float = DECAY) -> dict[str, Tensor]:
    """The average of these weights by `torch.optim.swa_utils`."""
    average = {name: tensor.clone() for name, tensor in steps[0].items()}
    update: Any = get_ema_multi_avg_fn(decay)
    for count, weights in enumerate(steps[1:], 1):
        update(list(average.values()), list(weights.values()), count)
    return average


class FullToy(Toy):
    lora = None


@pytest.mark.parametrize("make", [Toy, FullToy])
def test_the_average_is_torchs(make: type[LightningModule], tmp_path: Path) -> None:
    steps, ema, module = Steps(), AdapterEMA(decay=DECAY), make()
    fit(module, tmp_path, ema, steps, max_epochs=2)
    assert len(steps.trained) == 8
    assert toys.same(trained(module), torchs(steps.trained))
    # A second opinion, in float64.
    exact = {name: tensor.double() for name, tensor in steps.trained[0].items()}
    for weights in steps.trained[1:]:
        exact = {name: DECAY * exact[name] + (1 - DECAY) * weights[name].double() for name in exact}
    torch.testing.assert_close({name: tensor.double() for name, tensor in trained(module).items()}, exact)


def test_it_is_lightnings_of_the_adapters(tmp_path: Path) -> None:
    ours, theirs = Toy(), Toy()
    callbacks = AdapterEMA(decay=DECAY), EMAWeightAveraging(decay=DECAY)
    for module, callback in zip((ours, theirs), callbacks, strict=True):
        torch.manual_seed(0)
        fit(module, tmp_path, callback, max_epochs=2)
    torch.testing.assert_close(toys.snapshot(ours), toys.snapshot(theirs))
    assert callbacks[1]._average_model is not None
    assert held(callbacks[1]._average_model.state_dict()) == held(ours.state_dict()) + 1  # and a counter
    assert held(callbacks[0]._average) == held(trained(ours)) < held(ours.state_dict())


def test_validation_is_of_the_average_and_training_goes_on_with_the_weights(tmp_path: Path) -> None:
    steps, plain = Steps(), Steps()
    for callbacks in ((AdapterEMA(decay=DECAY), steps), (plain,)):
        torch.manual_seed(0)
        fit(Toy(), tmp_path, *callbacks, max_epochs=2, val_check_interval=2)
    assert len(steps.validated) == 8
    for validation in range(4):
        assert toys.same(steps.validated[2 * validation], torchs(steps.trained[: 2 * (validation + 1)]))
        assert toys.same(steps.after_validation[validation], steps.trained[2 * validation + 1])
    assert all(map(toys.same, steps.trained, plain.trained))


def test_it_begins_and_updates_when_told(tmp_path: Path) -> None:
    steps, module = Steps(), Toy()
    ema = AdapterEMA(decay=DECAY, update_every_n_steps=2, update_starting_at_step=3)
    fit(module, tmp_path, ema, steps, max_epochs=2, val_check_interval=2)
    # Only steps 4 and 6 of 0 to 7 update.
    assert toys.same(trained(module), torchs([steps.trained[4], steps.trained[6]]))
    assert toys.same(steps.validated[0], steps.trained[1])


@pytest.mark.parametrize("every", [2, 4])
def test_it_updates_where_a_batch_takes_several_steps(every: int, tmp_path: Path) -> None:
    class Two(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            for _ in range(2):
                self.optimizers().zero_grad()  # pyright: ignore[reportAttributeAccessIssue]
                self.manual_backward(super().training_step(batch, batch_idx))
                self.optimizers().step()  # pyright: ignore[reportAttributeAccessIssue]
            return torch.zeros(())

    steps, module = Steps(), Two()
    module.automatic_optimization = False
    fit(module, tmp_path, AdapterEMA(decay=DECAY, update_every_n_steps=every), steps, max_epochs=2)
    assert toys.same(trained(module), torchs(steps.trained[:: every // 2]))


def test_only_what_is_trained_is_held_and_written(tmp_path: Path) -> None:
    ema, module = AdapterEMA(), Toy()
    trainer = fit(module, tmp_path, ema)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)
    names = trained(module).keys()
    assert ema._average.keys() == names
    assert kept["state_dict"].keys() == kept["current_model_state"].keys() == kept["averaging_state"]["average"].keys()
    assert kept["state_dict"].keys() == names
    assert toys.same(kept["state_dict"], trained(module))
    other = Toy()
    trainer.test(other, toys.loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False)
    assert toys.same(toys.snapshot(other), toys.snapshot(module))


def test_a_narrow_parameter_has_a_wide_average(tmp_path: Path) -> None:
    """An update with share 0.001 would be rounded away in bfloat16."""

    class Narrow(FullToy):
        def __init__(self) -> None:
            super().__init__()
            self.net.bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.bfloat16()).float()

    steps, ema, module = Steps(), AdapterEMA(decay=0.999), Narrow()
    fit(module, tmp_path, ema, steps, max_epochs=4)
    exact = {name: tensor.double() for name, tensor in steps.trained[0].items()}
    for weights in steps.trained[1:]:
        exact = {name: 0.999 * exact[name] + 0.001 * weights[name].double() for name in exact}
    torch.testing.assert_close({name: t.double() for name, t in ema._average.items()}, exact, rtol=1e-5, atol=1e-6)
    assert {tensor.dtype for tensor in trained(module).values()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize(("make", "accumulate"), [(DiceyLoRA, 1), (DiceyLoRA, 3), (DiceyFull, 1)])
def test_a_run_that_averages_goes_on_exactly(
    make: type[LightningModule], accumulate: int, is_first: bool, tmp_path: Path
) -> None:
    def again(place: str | None = None) -> resuming.Outcome:
        path = None if place is None else tmp_path / f"{place}.ckpt"
        options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "val_check_interval": 3, "is_first": is_first}
        return resuming.run(make, tmp_path, path, callbacks=[AdapterEMA(DECAY)], **options)

    whole = again()
    for place in ("batch-0-1", "batch-0-3", "batch-0-4", "validation-1-3", "epoch-0", "batch-1-7"):
        found = unlike(whole, again(place))
        assert not found, f"{place}: {found[:5]}"


def test_the_average_is_needed(tmp_path: Path) -> None:
    whole = resuming.run(DiceyLoRA, tmp_path, callbacks=[AdapterEMA(DECAY)])
    kept = torch.load(tmp_path / "batch-1-3.ckpt", weights_only=True)
    kept["averaging_state"]["average"] = kept["current_model_state"]
    torch.save(kept, tmp_path / "less.ckpt")
    assert unlike(whole, resuming.run(DiceyLoRA, tmp_path, tmp_path / "less.ckpt", callbacks=[AdapterEMA(DECAY)]))


def test_a_run_that_ended_is_prolonged_with_its_weights(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_epochs": -1, "val_check_interval": 3}
    whole = resuming.run(DiceyLoRA, tmp_path, max_steps=12, callbacks=[AdapterEMA(DECAY)], **options)
    resuming.run(DiceyLoRA, tmp_path / "half", max_steps=5, callbacks=[AdapterEMA(DECAY)], **options)
    end = tmp_path / "half" / "end" / "end.ckpt"
    assert not unlike(
        whole, resuming.run(DiceyLoRA, tmp_path, end, max_steps=12, callbacks=[AdapterEMA(DECAY)], **options)
    )


def test_adapter_folders_hold_the_average(tmp_path: Path) -> None:
    steps, module = Steps(), Toy()
    folders = AdapterCheckpoint(str(tmp_path / "adapters"), monitor="val_loss")
    fit(module, tmp_path, folders, AdapterEMA(decay=DECAY), steps, max_epochs=2)
    other = Toy()
    other.apply_lora()
    load_adapter(other, tmp_path / "adapters" / "last")
    assert toys.same(trained(other), torchs(steps.trained))


def test_it_averages_a_module_that_one_cannot_edit(tmp_path: Path) -> None:
    steps, module = Steps(), Plain()
    fit(module, tmp_path, AdapterEMA(decay=DECAY), LoRA(LoRAConfig(rank=2)), steps)
    assert toys.same(trained(module), torchs(steps.trained))
    assert all("lora_" in name for name in trained(module))


def test_an_exception_leaves_the_weights(tmp_path: Path) -> None:
    class Failing(Toy):
        def on_validation_epoch_end(self) -> None:
            raise RuntimeError("out of luck")

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            if batch_idx:
                raise RuntimeError("out of luck")

    steps, module = Steps(), Failing()
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(module, tmp_path, AdapterEMA(decay=DECAY), steps)
    assert toys.same(trained(module), steps.trained[-1])


def test_a_checkpoint_without_an_average_begins_one_with_a_warning(tmp_path: Path) -> None:
    fit(Toy(), tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    trainer = toys.trainer(tmp_path, callbacks=[AdapterEMA()], max_epochs=2)
    with pytest.warns(UserWarning, match="written without AdapterEMA: the average starts with its weights"):
        trainer.fit(Toy(), toys.loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1\.0"),
        ({"decay": float("nan")}, "decay must be"),
        ({"update_every_n_steps": 0}, "update_every_n_steps must be at least 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdapterEMA(**options)


def test_what_cannot_be_averaged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="AdapterEMA and EMAWeightAveraging would both"):
        fit(Toy(), tmp_path, AdapterEMA(), EMAWeightAveraging())
    with pytest.raises(ConfigError, match=r"ModelCheckpoint\(save_weights_only=True\) writes without asking callbacks"):
        fit(Toy(), tmp_path, AdapterEMA(), ModelCheckpoint(tmp_path, save_weights_only=True), enable_checkpointing=True)


def test_strategies_that_flatten_or_write_shards_are_refused(tmp_path: Path) -> None:
    for strategy, message in (
        (FSDPStrategy(), "cannot average the flattened weights of FSDPStrategy"),
        (ModelParallelStrategy(), "give the strategy save_distributed_checkpoint=False"),
    ):
        # Lightning has these on a GPU only, or in several processes.
        trainer: Any = SimpleNamespace(strategy=strategy, callbacks=[])
        with pytest.raises(ConfigError, match=message):
            AdapterEMA().setup(trainer, Toy(), "fit")


def test_a_run_that_goes_on_without_its_average_is_told(tmp_path: Path) -> None:
    fit(Toy(), tmp_path, AdapterEMA()).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match=r"Please add the following callbacks: \['AdapterEMA'\]"):
        toys.trainer(tmp_path, max_epochs=2).fit(Toy(), toys.loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)


def test_a_checkpoint_of_another_average_is_refused(tmp_path: Path) -> None:
    trainer = toys.trainer(tmp_path, callbacks=[EMAWeightAveraging(decay=DECAY)])
    trainer.fit(Toy(), toys.loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer = toys.trainer(tmp_path, callbacks=[AdapterEMA()], max_epochs=2)
    told = pytest.warns(UserWarning, match=r"Please add the following callbacks: \['EMAWeightAveraging'\]")
    with told, pytest.raises(ConfigError, match="was not written by AdapterEMA"):
        trainer.fit(Toy(), toys.loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
