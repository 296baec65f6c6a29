"""An adapted module can be copied and pickled, whoever adapted it, and a process that never saw it can unpickle it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRAMixin, inject_lora, lora_layers
from lightning_lora.callbacks import LoRA
from tests.support import toys
from tests.support.tiny_models import TOKENS, llama, logits
from tests.support.toys import Plain, Toy, same, snapshot

pytestmark = toys.expected_warnings

CONFIG = LoRAConfig(rank=2)
X = torch.linspace(-1, 1, 32).reshape(8, 4)


class MyLinear(nn.Linear):
    """A user's subclass, which gets an adapted class made on the fly."""


class OwnLayers(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net.second = MyLinear(8, 2)


def fitted(module: Any, folder: Path, *callbacks: Any) -> Any:
    toys.trainer(folder, callbacks=list(callbacks)).fit(module, toys.loader(), weights_only=True)
    return module.eval()


MAKE: dict[str, Callable[[Path], Any]] = {
    "mixin": lambda folder: fitted(Toy(), folder),
    "callback": lambda folder: fitted(Plain(), folder, LoRA(CONFIG)),
    "callback on own layers": lambda folder: fitted(OwnLayers(), folder, LoRA(CONFIG)),
}


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("name", MAKE)
def test_a_copy_is_adapted_as_the_module_is_and_trains_on(name: str, way: Callable[[Any], Any], tmp_path: Path) -> None:
    module = MAKE[name](tmp_path)
    again = way(module)
    assert type(again) is type(module)
    assert isinstance(again, LoRAMixin)
    assert again.lora == module.lora
    assert same(snapshot(again), snapshot(module))
    assert torch.equal(again(X), module(X))
    before = snapshot(module)
    fitted(again, tmp_path)
    assert not same(snapshot(again), before)
    assert same(snapshot(module), before)


LOAD = """
import pickle, sys, torch
module, x, y = pickle.load(open(sys.argv[1], "rb"))
assert torch.equal(module(x), y)
from lightning_lora import LoRAMixin, lora_layers
assert isinstance(module, LoRAMixin) and len(lora_layers(module)) == 2
"""


@pytest.mark.parametrize("name", MAKE)
def test_another_process_unpickles_it(name: str, tmp_path: Path) -> None:
    module = MAKE[name](tmp_path)
    (tmp_path / "module.pkl").write_bytes(pickle.dumps((module, X, module(X).detach())))
    toys.run_python(LOAD, tmp_path / "module.pkl")


def test_a_whole_module_goes_through_torch_save(tmp_path: Path) -> None:
    module = MAKE["callback"](tmp_path)
    torch.save(module, tmp_path / "module.pt")
    again = torch.load(tmp_path / "module.pt", weights_only=False)
    assert torch.equal(again(X), module(X))


def test_a_language_model_that_has_trained_is_pickled() -> None:
    model = llama().train()
    inject_lora(model, CONFIG)
    for _ in range(2):  # layers with one input are found in the first step
        model(TOKENS, labels=TOKENS).loss.backward()
    again = pickle.loads(pickle.dumps(model))
    assert lora_layers(again).keys() == lora_layers(model).keys()
    assert torch.equal(logits(again), logits(model))
