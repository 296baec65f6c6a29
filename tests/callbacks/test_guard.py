"""The guard stops what would silently train nothing, and is silent itself where all is well."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_lora import GuardError, LoRAConfig, LoRAMixin, lora_layers
from lightning_lora.callbacks import LoRAGuard
from lightning_lora.lora.layers.base import LoRALayer
from lightning_lora.tasks import CausalLM
from tests.support import toys
from tests.support.toys import Net, Plain, Toy

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
            # As the stock LightningCLI does it: the optimizer is older than the adapters.
            return torch.optim.Adam([p for name, p in self.named_parameters() if "lora_" not in name])

        def configure_model(self) -> None:
            from lightning_lora import inject_lora

            inject_lora(self, CONFIG)

    with pytest.raises(GuardError, match=r"4 of 4 trainable parameters are in no optimizer"):
        fit(Injected(), tmp_path)


def test_adapter_in_two_optimizers_is_refused(tmp_path: Path) -> None:
    class Twice(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            groups = [p for p in self.parameters() if p.requires_grad]
            return [torch.optim.SGD(groups), torch.optim.SGD(groups)]

    with pytest.raises(
        GuardError, match=r"4 parameters are in more than one optimizer and would be updated twice: net.first.lora_A"
    ):
        fit(Twice(), tmp_path)


def test_frozen_adapter_is_refused(tmp_path: Path) -> None:
    class Frozen(Toy):
        def configure_optimizers(self) -> Any:
            self.net.first.lora_A.requires_grad_(False)
            return super().configure_optimizers()

    with pytest.raises(GuardError, match=r"1 adapter parameters are frozen and would not train: net.first.lora_A"):
        fit(Frozen(), tmp_path)


class Bypass(nn.Module):
    """Computes with a layer's weight without calling the layer; ``modes`` says when."""

    def __init__(self, *modes: bool) -> None:
        super().__init__()
        self.modes = modes
        self.layer = nn.Linear(4, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        bypassed = self.training in self.modes
        return self.out(F.linear(x, self.layer.weight, self.layer.bias) if bypassed else self.layer(x))


class Bypassing(LoRAMixin, Plain):
    lora = CONFIG

    def __init__(self, *modes: bool) -> None:
        super().__init__()
        self.net = Bypass(*modes)  # pyright: ignore[reportAttributeAccessIssue]


def test_bypassed_layer_in_training_is_named_after_patience(tmp_path: Path) -> None:
    module = Bypassing(True, False)
    with pytest.raises(GuardError, match=r"1 adapters took no part in training for 3 optimizer steps: net.layer\."):
        fit(module, tmp_path, LoRAGuard(patience=3))
    assert untouched(module)


def test_bypassed_layer_is_named_at_the_end_of_a_run_shorter_than_patience(tmp_path: Path) -> None:
    with pytest.raises(GuardError, match=r"1 adapters took no part in training: net.layer\. Something computes"):
        fit(Bypassing(True), tmp_path, LoRAGuard(patience=100))


@pytest.mark.parametrize("sanity", [0, 1])
def test_bypassed_layer_in_evaluation_is_named(sanity: int, tmp_path: Path) -> None:
    module = Bypassing(False)
    with pytest.raises(GuardError, match=r"1 adapters took no part in evaluation: net.layer\."):
        fit(module, tmp_path, validation=toys.loader(), num_sanity_val_steps=sanity)
    assert untouched(module)


def test_bypassed_layer_of_the_module_itself_is_named(tmp_path: Path) -> None:
    class Direct(LoRAMixin, LightningModule):
        lora = CONFIG

        def __init__(self) -> None:
            super().__init__()
            self.used, self.bypassed = nn.Linear(4, 4), nn.Linear(4, 4)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            # By a way that the code of the class does not tell.
            weight = dict(self.named_parameters())["bypassed.weight"]
            return F.linear(self.used(batch[0]), weight).square().sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    with pytest.raises(GuardError, match=r"1 adapters took no part in training: bypassed"):
        fit(Direct(), tmp_path)


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


def test_changed_buffers_are_a_warning_that_names_them(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"training changed 3 buffers of the base: norm.running_mean, "):
        fit(Normed(), tmp_path)


def test_layers_get_their_forward_back_after_an_exception(tmp_path: Path) -> None:
    class Failing(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ValueError("no luck")

    module = Failing()
    with pytest.raises(ValueError, match="no luck"):
        fit(module, tmp_path)
    assert untouched(module)


def test_layers_get_their_forward_back_when_an_epoch_is_skipped(tmp_path: Path) -> None:
    class Skipping(Toy):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if self.current_epoch == 0 else None

    module = Skipping()
    fit(module, tmp_path, max_epochs=2, validation=toys.loader())
    assert untouched(module)


def test_a_forward_that_others_put_on_a_layer_is_kept(tmp_path: Path) -> None:
    # accelerate hooks layers like this.
    module = Toy()
    module.apply_lora()
    layer, called = module.net.first, []

    def hooked(x: Tensor) -> Tensor:
        called.append(True)
        return type(layer).forward(layer, x)

    layer.__dict__["forward"] = hooked
    fit(module, tmp_path)
    assert layer.__dict__["forward"] is hooked
    assert len(called) == 4


class Adversarial(LoRAMixin, LightningModule):
    """Two optimizers that take turns; evaluation runs one of the two networks."""

    lora = CONFIG

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = Net(), nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()[batch_idx % 2]  # pyright: ignore[reportIndexIssue]
        loss = self.critic(batch[1]).mean() if batch_idx % 2 else self.generator(batch[0]).square().mean()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.generator(batch[0])

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), lr=0.05) for net in (self.generator, self.critic)]


def test_manual_optimisation_with_two_optimizers_that_take_turns(tmp_path: Path) -> None:
    module = Adversarial()
    with pytest.warns(
        UserWarning, match=r"2 adapters took no part in evaluation: critic.0, critic.2\. That is right only"
    ):
        fit(module, tmp_path, max_epochs=4, validation=toys.loader())
    assert all(toys.moved(module))


def test_layers_in_a_list_belong_to_the_module_around_it(tmp_path: Path) -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 2)])

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.layers
            assert isinstance(first, LoRALayer)
            return second(first(x) if self.training else F.linear(x, first.weight))

    module = Toy()
    module.net = Listed()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(GuardError, match=r"1 adapters took no part in evaluation: net.layers.0\."):
        fit(module, tmp_path, validation=toys.loader())


def test_compiled_submodule(tmp_path: Path) -> None:
    class Compiled(Toy):
        def configure_model(self) -> None:
            if not isinstance(self.net, torch._dynamo.OptimizedModule):
                self.apply_lora()
                self.net = torch.compile(self.net, backend="eager", fullgraph=True)  # pyright: ignore

    module = Compiled()
    fit(module, tmp_path, max_epochs=2, validation=toys.loader())
    assert len(lora_layers(module)) == 2
    assert all(toys.moved(module))
    assert untouched(module.net._orig_mod)  # pyright: ignore


def test_one_guard_serves_two_runs(tmp_path: Path) -> None:
    guard, module = LoRAGuard(), Toy()
    fit(module, tmp_path, guard, validation=toys.loader())
    fit(module, tmp_path, guard, validation=toys.loader())
    toys.trainer(tmp_path, callbacks=[guard]).validate(module, toys.loader(), verbose=False)


class Poison(Callback):
    """Puts one value that is not finite into one weight after a step, as a flipped bit or a bad kernel would."""

    def __init__(self, step: int, value: float, name: str) -> None:
        self.step, self.value, self.name = step, value, name

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.get_parameter(self.name).view(-1)[0] = self.value


def test_a_nan_that_the_loss_does_not_show_is_reported_within_one_interval(llama_folder: Path, tmp_path: Path) -> None:
    """Fault F11: torch's fused attention on a CPU gives a finite loss for NaN queries."""
    losses: dict[int, float] = {}

    class Frozen(CausalLM):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            # Or the gradients, which are NaN, would spread it at once: FiniteGradients would see them.
            optimizer.zero_grad()

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses[self.global_step] = float(outputs["loss"])

    tokens = torch.randint(5, 20, (40, 9), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in tokens]
    name = "model.model.layers.0.self_attn.q_proj.lora_A"
    trainer = toys.trainer(tmp_path, callbacks=[Poison(7, float("nan"), name), LoRAGuard(patience=5)])
    module = Frozen(str(llama_folder), lora=LoRAConfig(rank=2))
    with pytest.raises(GuardError, match=rf"1 trained weights are NaN or infinite after optimizer step 10: {name}\. "):
        trainer.fit(module, DataLoader(cast(Any, rows), batch_size=2))
    assert all(map(math.isfinite, losses.values()))
    assert max(losses) >= 9


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_written(value: float, tmp_path: Path) -> None:
    files = ModelCheckpoint(tmp_path / "files", save_top_k=-1, every_n_train_steps=1, filename="{step}")
    poison = Poison(2, value, "net.first.lora_A")
    with pytest.raises(GuardError, match="trained weights are NaN or infinite after optimizer step 3"):
        fit(Toy(), tmp_path, LoRAGuard(patience=50), callbacks=[poison, files], enable_checkpointing=True)
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == ["step=1.ckpt", "step=2.ckpt"]


def test_weights_that_are_not_finite_are_not_validated(tmp_path: Path) -> None:
    poison = Poison(2, float("nan"), "net.first.lora_A")
    validation = {"validation": toys.loader(4), "val_check_interval": 3}
    with pytest.raises(GuardError, match="trained weights are NaN or infinite after optimizer step 3"):
        fit(Toy(), tmp_path, LoRAGuard(patience=50), callbacks=[poison], **validation)


def test_large_weights_are_no_alarm(tmp_path: Path) -> None:
    """Their norm overflows, none of them does."""
    fit(Toy(), tmp_path, LoRAGuard(patience=1), callbacks=[Poison(2, 1e25, "net.first.lora_A")])
