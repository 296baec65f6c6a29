"""A LightningModule with the mixin is adapted at the right moment, whatever its own hooks look like."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from lightning_lora import AlreadyShardedError, ConfigError, LoRAConfig, LoRAMixin, TargetNotFoundError, lora_layers
from tests.support import toys
from tests.support.toys import Net, Plain, Toy, fit

pytestmark = toys.expected_warnings

CONFIG = LoRAConfig(rank=2)


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


def test_unknown_lora_root_names_the_near_one() -> None:
    module = Toy()
    module.lora_root = "nett"
    with pytest.raises(TargetNotFoundError, match=r"'nett' is not a submodule of Toy; did you mean 'net'"):
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
