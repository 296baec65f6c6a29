"""The guard stops a run that would silently train nothing, and says nothing of a good run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import GuardError, LoRAConfig, LoRAMixin, load_adapter
from lightning_lora.callbacks import LoRAGuard
from tests.support import toys
from tests.support.toys import Plain, Toy

pytestmark = toys.expected_warnings

CONFIG = LoRAConfig(rank=2)


def fit(module: LightningModule, folder: Path, guard: LoRAGuard | None = None, **options: Any) -> Any:
    callbacks = [guard or LoRAGuard(), *options.pop("callbacks", [])]
    validation = options.pop("validation", None)
    ckpt_path = options.pop("ckpt_path", None)
    runner = toys.trainer(folder, callbacks=callbacks, **options)
    runner.fit(module, toys.loader(), validation, ckpt_path=ckpt_path, weights_only=True)
    return runner


def untouched(module: nn.Module) -> bool:
    """Whether no module has a ``forward`` of its own left."""
    return not [child for child in module.modules() if "forward" in child.__dict__]


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 3}, {"max_epochs": 3}, {"precision": "bf16-true"}, {"limit_val_batches": 1}],
)
def test_it_is_silent_where_all_is_well(options: dict[str, Any], tmp_path: Path) -> None:
    module = Toy()
    fit(module, tmp_path, validation=toys.loader(), num_sanity_val_steps=2, **options)
    assert all(toys.moved(module))
    assert untouched(module)


def test_without_lora_it_does_nothing(tmp_path: Path) -> None:
    fit(Plain(), tmp_path, validation=toys.loader())


def test_optimizer_without_the_adapters_is_refused(tmp_path: Path) -> None:
    class Injected(Plain):
        def configure_optimizers(self) -> Any:
            # As the stock LightningCLI does it: the optimizer is made before the adapters.
            return torch.optim.Adam([p for name, p in self.named_parameters() if "lora_" not in name])

        def configure_model(self) -> None:
            from lightning_lora import inject_lora

            inject_lora(self, CONFIG)

    with pytest.raises(GuardError, match=r"4 of 4 trainable parameters are in no optimizer"):
        fit(Injected(), tmp_path)


def test_frozen_adapter_is_refused(tmp_path: Path) -> None:
    class Frozen(Toy):
        def configure_optimizers(self) -> Any:
            self.net.first.lora_A.requires_grad_(False)
            return super().configure_optimizers()

    with pytest.raises(GuardError, match=r"1 adapter parameters are frozen and would not train: net.first.lora_A"):
        fit(Frozen(), tmp_path)


class Detached(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return self.net.second(torch.tanh(self.net.first(x)).detach())


def test_adapter_without_a_gradient_is_named(tmp_path: Path) -> None:
    with pytest.raises(GuardError, match=r"1 adapters got no gradient in 2 optimizer steps: net.first\. .*reentrant"):
        fit(Detached(), tmp_path, LoRAGuard(patience=2))


class Reentrant(Toy):
    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.net.first, x, use_reentrant=True)
        assert isinstance(y, Tensor)
        return self.net.second(torch.tanh(y))


def test_reentrant_checkpointing_of_frozen_inputs_is_named(tmp_path: Path) -> None:
    with (
        pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"),
        pytest.raises(
            GuardError, match=r"1 adapters got no gradient in 2 optimizer steps: net.first\. .*use_reentrant"
        ),
    ):
        fit(Reentrant(), tmp_path, LoRAGuard(patience=2))


class NotReentrant(Toy):
    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.net.first, x, use_reentrant=False)
        assert isinstance(y, Tensor)
        return self.net.second(torch.tanh(y))


def test_other_checkpointing_gives_every_adapter_its_gradient(tmp_path: Path) -> None:
    module = NotReentrant()
    fit(module, tmp_path, LoRAGuard(patience=1))
    assert all(toys.moved(module))


def test_adapter_that_did_not_move_is_named(tmp_path: Path) -> None:
    with pytest.raises(GuardError, match=r"1 of 2 adapters did not move in training: net.first\."):
        fit(Detached(), tmp_path)


def test_patience_counts_from_where_a_run_resumes(tmp_path: Path) -> None:
    class Later(Toy):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.net.first(x))
            late = self.trainer.training and self.trainer.global_step < 6
            return self.net.second(hidden.detach() if late else hidden)

    path = tmp_path / "a.ckpt"
    fit(Toy(), tmp_path).save_checkpoint(path)
    fit(Later(), tmp_path, LoRAGuard(patience=3), max_epochs=2, ckpt_path=path)


def test_a_run_that_stays_at_learning_rate_zero_moves_nothing_and_passes(tmp_path: Path) -> None:
    class Warming(Toy):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    fit(Warming(), tmp_path, fast_dev_run=True)


class Meddle(Callback):
    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pl_module.get_parameter(self.name).data.view(-1)[0] += 1e-3


def test_changed_base_is_named(tmp_path: Path) -> None:
    with pytest.raises(GuardError, match=r"1 frozen base weights were changed by training: net.second.weight"):
        fit(Toy(), tmp_path, callbacks=[Meddle("net.second.weight")])


def test_fully_trained_modules_may_change(tmp_path: Path) -> None:
    module = Toy()
    module.lora = LoRAConfig(rank=2, targets=["first"], trainable=["second"])
    fit(module, tmp_path)


class Normed(LoRAMixin, Plain):
    lora = CONFIG

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.norm(x))


def test_buffers_may_change_as_they_are_saved(tmp_path: Path) -> None:
    module = Normed()
    fit(module, tmp_path)
    module.save_adapter(tmp_path / "adapter")
    again = Normed()
    load_adapter(again, tmp_path / "adapter")
    assert again.norm.state_dict()["num_batches_tracked"] > 0
    assert toys.same(dict(again.named_buffers()), dict(module.named_buffers()))


def test_one_guard_serves_two_runs(tmp_path: Path) -> None:
    guard, module = LoRAGuard(), Toy()
    fit(module, tmp_path, guard, validation=toys.loader())
    fit(module, tmp_path, guard, validation=toys.loader())
    toys.trainer(tmp_path, callbacks=[guard]).validate(module, toys.loader(), verbose=False)
