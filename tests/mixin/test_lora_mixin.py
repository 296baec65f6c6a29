"""A LightningModule with the mixin is adapted at the right moment, whatever its own hooks look like."""

from __future__ import annotations

import difflib
import re
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora import (
    AlreadyShardedError,
    ConfigError,
    GuardError,
    LoRAConfig,
    LoRAMixin,
    TargetNotFoundError,
    lora_layers,
)
from lightning_lora.callbacks import LoRA
from tests.support import toys
from tests.support.toys import Net, Plain, Toy

pytestmark = toys.expected_warnings

CONFIG = LoRAConfig(rank=2)


def fit(module: LightningModule, folder: Path, **options: Any) -> Any:
    runner = toys.trainer(folder, **options)
    runner.fit(module, toys.loader())
    return runner


class OwnArgument(LoRAMixin, Plain):
    def __init__(self, lora: Any = None) -> None:
        super().__init__(lora=lora)
        self.net = Net()


class SetInInit(LoRAMixin, Plain):
    def __init__(self) -> None:
        super().__init__()
        self.lora = CONFIG


class OwnHookWithoutSuper(LoRAMixin, Plain):
    lora = CONFIG

    def configure_model(self) -> None:
        self.net = Net()


class OwnHookWithSuper(LoRAMixin, Plain):
    lora = CONFIG

    def configure_model(self) -> None:
        # Were the inner call to inject, the layers built after it would go without.
        super().configure_model()
        self.net = Net()


class Grandchild(OwnHookWithSuper):
    def configure_model(self) -> None:
        super().configure_model()
        self.extra = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.extra(super().forward(x))


class UserHook(Plain):
    def configure_model(self) -> None:
        self.net = Net()


class Behind(LoRAMixin, UserHook):
    lora = CONFIG


class InFront(UserHook, LoRAMixin):
    lora = CONFIG


class AppliesItself(LoRAMixin, Plain):
    lora = CONFIG

    def configure_model(self) -> None:
        self.apply_lora()
        self.seen = len(lora_layers(self))


@pytest.mark.parametrize(
    "make",
    [
        Toy,
        SetInInit,
        lambda: OwnArgument(CONFIG),
        lambda: OwnArgument({"rank": 2}),
        OwnHookWithoutSuper,
        OwnHookWithSuper,
        Grandchild,
        Behind,
        InFront,
        AppliesItself,
    ],
)
def test_every_layer_is_adapted_once_and_trains_and_the_base_does_not(make: Any, tmp_path: Path) -> None:
    module = make()
    found: dict[str, Any] = {}

    class Look(Callback):
        def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
            found.update(toys.base_of(pl_module))

    fit(module, tmp_path, callbacks=[Look()])
    linears = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    assert list(lora_layers(module)) == linears
    assert {layer.lora_spec.rank for layer in lora_layers(module).values()} == {2}
    assert all(toys.moved(module))
    assert toys.same(found, toys.base_of(module))


def test_apply_lora_inside_the_hook_takes_effect_there(tmp_path: Path) -> None:
    module = AppliesItself()
    fit(module, tmp_path)
    assert module.seen == 2


def test_configure_model_may_run_five_times(tmp_path: Path) -> None:
    module = Toy()
    module.configure_model()
    before = {id(parameter) for parameter in module.parameters()}
    for _ in range(4):
        module.configure_model()
    assert {id(parameter) for parameter in module.parameters()} == before
    assert len(lora_layers(module)) == 2


def test_fit_test_and_validate_on_one_object(tmp_path: Path) -> None:
    module = Toy()
    runner = fit(module, tmp_path)
    trained = toys.snapshot(module)
    tested = runner.test(module, toys.loader(), verbose=False)
    validated = runner.validate(module, toys.loader(), verbose=False)
    assert tested == validated
    assert toys.same(trained, toys.snapshot(module))


def test_lora_root_adapts_the_submodule_and_leaves_the_rest_alone(tmp_path: Path) -> None:
    class Rooted(LoRAMixin, Plain):
        def __init__(self) -> None:
            super().__init__(lora=LoRAConfig(rank=2, targets=["first"]), lora_root="net")
            self.net = Net()
            self.head = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.net(x))

    module = Rooted()
    head = module.head.weight.detach().clone()
    fit(module, tmp_path)
    assert list(lora_layers(module)) == ["net.first"]
    assert not torch.equal(head, module.head.weight)


def test_unknown_lora_root_names_the_near_one() -> None:
    module = Toy()
    module.lora_root = "nett"
    with pytest.raises(TargetNotFoundError, match=r"'nett' is no submodule of Toy; did you mean 'net'"):
        module.apply_lora()


def test_without_lora_apply_lora_does_nothing_even_before_the_root_exists() -> None:
    module = Toy()
    module.lora, module.lora_root = None, "built_later"
    module.apply_lora()
    assert not lora_layers(module)


def test_misspelled_setting_is_refused_when_the_module_is_made() -> None:
    with pytest.raises(ConfigError, match=r"no setting 'ranks'; did you mean 'rank'"):
        OwnArgument({"ranks": 2})


SHARDS_FIRST = """
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tests.support.toys import Toy
from lightning_lora import AlreadyShardedError

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)

class Wrong(Toy):
    def configure_model(self):
        fully_shard(self.net, mesh=init_device_mesh("cpu", (1,)))

try:
    Wrong().configure_model()
except AlreadyShardedError as error:
    print(error)
torch.distributed.destroy_process_group()
"""


def test_sharding_before_the_adapters_is_refused() -> None:
    said = toys.run_python(SHARDS_FIRST).stdout
    assert re.search(r"'net.first.weight' is sharded already.*Call self.apply_lora\(\)", said)
    assert issubclass(AlreadyShardedError, RuntimeError)


def test_optimizer_built_before_injection_is_refused(tmp_path: Path) -> None:
    class Early(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.optimizer = torch.optim.Adam(self.parameters())

        def configure_optimizers(self) -> Any:
            return self.optimizer

    with pytest.raises(GuardError, match=r"4 of 4 trainable parameters are in no optimizer.*net.first.lora_A"):
        fit(Early(), tmp_path)


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`:UserWarning")
def test_no_optimizer_is_refused(tmp_path: Path) -> None:
    class Forgetful(Toy):
        def configure_optimizers(self) -> Any:
            return None

    with pytest.raises(GuardError, match="are in no optimizer and would not train"):
        fit(Forgetful(), tmp_path)


@pytest.mark.parametrize("lora", [None, CONFIG])
def test_missing_configure_optimizers_is_lightnings_own_error(lora: Any, tmp_path: Path) -> None:
    class Missing(LoRAMixin, LightningModule):
        def __init__(self) -> None:
            super().__init__(lora=lora)
            self.net = Net()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]).sum()

    with pytest.raises(MisconfigurationException, match="No `configure_optimizers\\(\\)` method defined"):
        fit(Missing(), tmp_path)


def test_everything_frozen_is_refused(tmp_path: Path) -> None:
    class Frozen(Toy):
        def on_fit_start(self) -> None:
            self.requires_grad_(False)

    with pytest.raises(GuardError, match="nothing would train: every parameter of Frozen is frozen"):
        fit(Frozen(), tmp_path)


def test_merged_module_is_not_trained(tmp_path: Path) -> None:
    class Merged(Toy):
        def on_fit_start(self) -> None:
            self.merge_lora()

    with pytest.raises(ConfigError, match="cannot train: 2 layers are merged"):
        fit(Merged(), tmp_path)


def test_stochastic_weight_averaging_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"StochasticWeightAveraging.*Use AdapterEMA"):
        fit(Toy(), tmp_path, callbacks=[StochasticWeightAveraging(0.1)])


def test_ema_averages_the_adapters_and_resumes(tmp_path: Path) -> None:
    def run(epochs: int, ckpt_path: Path | None = None) -> tuple[Toy, Any]:
        module = Toy()
        runner = toys.trainer(tmp_path, max_epochs=epochs, callbacks=[EMAWeightAveraging(decay=0.5)])
        runner.fit(module, toys.loader(), ckpt_path=ckpt_path, weights_only=True)
        return module, runner

    base = toys.base_of(Toy())
    whole, _ = run(2)
    _, half = run(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    kept = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert all("lora_" in name for name in [*kept["state_dict"], *kept.get("current_model_state", {})])
    assert toys.same(base, toys.base_of(whole))
    assert all(toys.moved(whole))


class SaveOnce(Callback):
    """A checkpoint in the middle of a run, where averaging keeps two copies of the weights."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def test_resuming_with_ema_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    path = tmp_path / "middle.ckpt"
    whole = Toy()
    fit(whole, tmp_path, max_epochs=2, callbacks=[EMAWeightAveraging(decay=0.5), SaveOnce(path, step=4)])
    kept = torch.load(path, weights_only=True)
    assert [name for name in kept["current_model_state"] if "lora_" not in name] == []
    resumed = Toy()
    runner = toys.trainer(tmp_path, max_epochs=2, callbacks=[EMAWeightAveraging(decay=0.5)])
    runner.fit(resumed, toys.loader(), ckpt_path=path, weights_only=True)
    assert toys.same(toys.snapshot(whole), toys.snapshot(resumed))


class EvalBase(LoRAMixin, Plain):
    def __init__(self, lora_root: str | None = None) -> None:
        super().__init__(lora=CONFIG, lora_root=lora_root)
        self.net = Net().eval()


@pytest.mark.parametrize("root", [None, "net"])
def test_base_left_in_eval_mode_warns_once(root: str | None, tmp_path: Path) -> None:
    module = EvalBase(root)
    with pytest.warns(UserWarning, match="the base model is in eval mode"):
        fit(module, tmp_path)
    toys.trainer(tmp_path).test(module, toys.loader(), verbose=False)
    fit(module, tmp_path)


def test_module_put_in_eval_mode_as_a_whole_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EvalBase().eval().apply_lora()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("precision", ["bf16-true", "32-true"])
def test_adapters_stay_float32_under_true_precision(precision: Any, tmp_path: Path) -> None:
    module = Toy()
    states: list[torch.dtype] = []

    class Look(Callback):
        def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
            states.extend(state["exp_avg"].dtype for state in trainer.optimizers[0].state.values())

    fit(module, tmp_path, precision=precision, callbacks=[Look()])
    layer = lora_layers(module)["net.first"]
    assert (layer.lora_A.dtype, layer.lora_B.dtype) == (torch.float32, torch.float32)
    assert layer.weight.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert states == [torch.float32] * 4


def test_resuming_in_bfloat16_keeps_every_bit_of_the_adapters(tmp_path: Path) -> None:
    def run(epochs: int, ckpt_path: Path | None = None) -> tuple[Toy, Any]:
        module = Toy()
        runner = toys.trainer(tmp_path, max_epochs=epochs, precision="bf16-true")
        runner.fit(module, toys.loader(), ckpt_path=ckpt_path, weights_only=True)
        return module, runner

    # A bfloat16 adapter has 8 significant bits: what a cast on the way in loses shows in the end.
    torch.manual_seed(3)
    whole, _ = run(2)
    torch.manual_seed(3)
    _, half = run(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(2, tmp_path / "half.ckpt")
    assert toys.same(toys.snapshot(whole), toys.snapshot(resumed))


def test_moving_the_module_moves_its_adapters() -> None:
    module = Toy()
    module.apply_lora()
    module.to(torch.float64)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float64}
    module.to("meta")
    assert all(parameter.is_meta for parameter in module.parameters())


class Saved(LoRAMixin, Plain):
    def __init__(self, lora: Any = None) -> None:
        super().__init__(lora=lora)
        self.save_hyperparameters()
        self.net = Net()


def test_hyperparameters_with_a_config_object_reload_with_weights_only(tmp_path: Path) -> None:
    module = Saved(LoRAConfig(rank=2, targets=["first"]))
    fit(module, tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    assert isinstance(module.hparams["lora"], LoRAConfig)
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]["lora"]["targets"] == ["first"]
    loaded = Saved.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert toys.same(toys.snapshot(module), toys.snapshot(loaded))


def test_hyperparameters_are_logged_as_plain_types(tmp_path: Path) -> None:
    import yaml
    from lightning.pytorch.loggers import CSVLogger

    fit(Saved(CONFIG), tmp_path, logger=CSVLogger(tmp_path, name="", version=""))
    assert yaml.safe_load((tmp_path / "hparams.yaml").read_text())["lora"]["rank"] == 2


BEFORE = """
class Mine(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)
"""
AFTER = BEFORE.replace("class Mine(LightningModule):", "class Mine(LoRAMixin, LightningModule):\n    lora = CONFIG")


def defined(source: str) -> Any:
    scope = {"LightningModule": LightningModule, "LoRAMixin": LoRAMixin, "CONFIG": CONFIG, "Net": Net, "torch": torch}
    exec(textwrap.dedent(source), scope)
    return scope["Mine"]()


def test_an_existing_module_is_adapted_by_three_changed_lines_at_most(tmp_path: Path) -> None:
    changes = [line for line in difflib.ndiff(BEFORE.splitlines(), AFTER.splitlines()) if line[0] == "+"]
    assert len(changes) + 1 <= 3  # and one import
    module = defined(AFTER)
    fit(module, tmp_path)
    assert len(lora_layers(module)) == 2
    assert all(toys.moved(module))


def test_an_existing_module_is_adapted_by_the_callback_without_any_change(tmp_path: Path) -> None:
    module = defined(BEFORE)
    fit(module, tmp_path, callbacks=[LoRA(CONFIG)])
    assert len(lora_layers(module)) == 2
    assert all(toys.moved(module))


def test_lightnings_own_demo_module_is_adapted(tmp_path: Path) -> None:
    class Boring(LoRAMixin, BoringModel):
        lora = CONFIG

    module = Boring()
    toys.trainer(tmp_path, max_steps=3).fit(module)
    assert toys.moved(module) == [True]


def test_full_fine_tuning_is_untouched_lightning(tmp_path: Path) -> None:
    class Full(LoRAMixin, Plain):
        lora = None

    runs = {}
    for kind in (Plain, Full):
        torch.manual_seed(0)
        module = kind()
        runner = fit(module, tmp_path)
        runner.save_checkpoint(tmp_path / f"{kind.__name__}.ckpt")
        runs[kind] = (module, torch.load(tmp_path / f"{kind.__name__}.ckpt", weights_only=True))
    plain, full = runs[Plain], runs[Full]
    assert toys.same(toys.snapshot(plain[0]), toys.snapshot(full[0]))
    assert [*plain[1], "lightning_lora_resume"] == list(full[1])
    assert plain[1]["state_dict"].keys() == full[1]["state_dict"].keys()
    (by_position,), (by_name,) = plain[1]["optimizer_states"], full[1]["optimizer_states"]
    names = [name for name, _ in full[0].named_parameters()]
    assert [group | {"params": names} for group in by_position["param_groups"]] == by_name["param_groups"]
    torch.testing.assert_close(dict(zip(names, by_position["state"].values(), strict=True)), by_name["state"])
    assert full[0].strict_loading
    del full[1]["state_dict"]["net.first.bias"]
    torch.save(full[1], tmp_path / "cut.ckpt")
    with pytest.raises(RuntimeError, match=r"Missing key.*net.first.bias"):
        Full.load_from_checkpoint(tmp_path / "cut.ckpt", weights_only=True)


def test_strict_loading_set_by_the_user_is_kept() -> None:
    class Lenient(LoRAMixin, Plain):
        def __init__(self) -> None:
            super().__init__(lora=None)
            self.net = Net()
            self.strict_loading = False

    assert not Lenient().strict_loading
    module = Toy()
    assert module.strict_loading
    module.apply_lora()
    assert not module.strict_loading


def test_hooks_of_the_user_run_once_and_ours_around_them(tmp_path: Path) -> None:
    said: list[str] = []

    class Hooked(Toy):
        def on_train_start(self) -> None:
            said.append("start")

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            said.append(f"save {len(checkpoint['state_dict'])}")

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            said.append(f"load {len(checkpoint['state_dict'])}")

    class HookedAgain(Hooked):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            super().on_save_checkpoint(checkpoint)
            said.append("again")

    fit(HookedAgain(), tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    # The user sees the whole state when it is saved, and the completed one when it is loaded.
    HookedAgain.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert said == ["start", "save 8", "again", "load 8"]
    assert len(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]) == 4


def test_parameter_groups_follow_the_learning_rate_rule() -> None:
    module = Toy()
    module.lora = LoRAConfig(rank=2, targets=["first"], trainable=["second"], lr_multiplier=5)
    module.apply_lora()
    adapters, full = module.lora_parameter_groups(0.1)
    assert (adapters["lr"], adapters["weight_decay"], len(adapters["params"])) == (0.5, 0.0, 2)
    assert (full["lr"], len(full["params"])) == (0.1, 2)
    module = Toy()
    module.lora = None
    assert [len(group["params"]) for group in module.lora_parameter_groups(0.1)] == [4]


@pytest.mark.parametrize("rate", [0, -1e-3, float("nan"), float("inf"), "1e-3", True, None])
def test_learning_rate_must_be_a_positive_number(rate: Any) -> None:
    with pytest.raises(ConfigError, match=r"learning_rate must be a finite number greater than 0, got"):
        Toy().lora_parameter_groups(rate)


def test_module_saves_and_merges_itself(tmp_path: Path) -> None:
    module = Toy()
    fit(module, tmp_path)
    x = torch.randn(3, 4)
    before = module(x)
    assert module.save_adapter(tmp_path / "adapter") == tmp_path / "adapter"
    fresh = Toy()
    ll.load_adapter(fresh, tmp_path / "adapter")
    torch.testing.assert_close(fresh(x), before)
    module.merge_lora()
    torch.testing.assert_close(module(x), before)
