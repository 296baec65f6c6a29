"""With `lora_root` everything outside it is frozen, counted and named; `trainable` opens it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    LoRAMixin,
    TargetNotFoundError,
    count_parameters,
    load_adapter,
    lora_layers,
)
from lightning_lora.callbacks import LoRA, LoRAGuard
from tests.support import toys
from tests.support.toys import Net, Plain

pytestmark = toys.expected_warnings


class Parts(Plain):
    """A body inside of a model, and beside it what a vision-language model has beside its language model."""

    def __init__(self) -> None:
        super().__init__()
        del self.net
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.ModuleDict({"body": Net(), "tower": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
            self.head = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
            self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.model["body"](self.model["norm"](self.model["tower"](x))) * self.scale)


class AdaptedParts(LoRAMixin, Parts):
    lora_root = "model.body"

    def __init__(self, *trainable: str) -> None:
        super().__init__()
        self.lora = LoRAConfig(rank=2, trainable=trainable)


FREEZES = pytest.mark.filterwarnings("ignore:.*parameters outside of lora_root .* are frozen now")


def by_mixin(*trainable: str) -> tuple[Parts, list[Any]]:
    return AdaptedParts(*trainable), []


def by_callback(*trainable: str) -> tuple[Parts, list[Any]]:
    return Parts(), [LoRA(LoRAConfig(rank=2, trainable=trainable), root="model.body")]


def train(make: Any, folder: Path, *trainable: str) -> tuple[Parts, set[str]]:
    """A trained module, and the names of what has changed outside of the adapters."""
    module, callbacks = make(*trainable)
    before = toys.base_of(module)
    toys.fit(module, folder, callbacks=[*callbacks, LoRAGuard()])
    assert all(toys.moved(module))
    return module, {name for name, tensor in toys.base_of(module).items() if not torch.equal(before[name], tensor)}


ways = pytest.mark.parametrize("make", [by_mixin, by_callback])


@ways
def test_nothing_outside_the_root_trains_and_one_warning_names_all_that_would(make: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="9 parameters outside of lora_root 'model.body' are frozen now") as said:
        module, changed = train(make, tmp_path)
    assert changed == set()
    assert list(lora_layers(module)) == ["model.body.first", "model.body.second"]
    warning = [str(w.message) for w in said if "outside of lora_root" in str(w.message)]
    assert len(warning) == 1
    assert "LoRAConfig(trainable=['scale', 'model.tower', 'model.norm', 'head'])" in warning[0]


@ways
@FREEZES
@pytest.mark.parametrize(
    ("pattern", "opened"),
    [
        ("head", {"head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}),
        ("head.2", {"head.2.weight", "head.2.bias"}),
        ("tower", {"model.tower.weight", "model.tower.bias"}),
        ("model.norm", {"model.norm.weight", "model.norm.bias"}),
        ("*.norm", {"model.norm.weight", "model.norm.bias"}),
        ("scale", {"scale"}),
    ],
)
def test_trainable_opens_what_it_names_outside(make: Any, pattern: str, opened: set[str], tmp_path: Path) -> None:
    assert train(make, tmp_path, pattern)[1] == opened


@FREEZES
def test_a_pattern_that_matches_inside_the_root_opens_nothing_of_the_same_ending_outside() -> None:
    class Twice(AdaptedParts):
        def __init__(self, *trainable: str) -> None:
            super().__init__(*trainable)
            self.lora = LoRAConfig(rank=2, targets=["first"], trainable=trainable)
            self.copy = nn.ModuleDict({"second": nn.Linear(8, 2)})
            self.second = nn.Linear(8, 2)

    module: Any = Twice("second")
    module.apply_lora()
    trained = {name for name, p in module.named_parameters() if p.requires_grad and "lora_" not in name}
    # `second` is the whole name of a module of the user's own; `copy.second` only ends like it.
    assert trained == {"model.body.second.weight", "model.body.second.bias", "second.weight", "second.bias"}


@pytest.mark.parametrize("pattern", ["hed", "model", "body", "model.body"])
def test_a_pattern_that_matches_nothing_or_what_holds_the_root_is_refused_and_nothing_is_changed(pattern: str) -> None:
    module = AdaptedParts(pattern)
    with pytest.raises(TargetNotFoundError, match=f"trainable '{pattern}' matches no module with parameters"):
        module.apply_lora()
    assert not lora_layers(module)
    assert all(parameter.requires_grad for parameter in module.parameters())


@FREEZES
def test_the_start_counts_the_whole_module(caplog: pytest.LogCaptureFixture) -> None:
    module = AdaptedParts("head")
    with caplog.at_level("INFO"):
        module.apply_lora()
    count = count_parameters(module)
    assert f"lora: {count.trainable:,} of {count.total:,} parameters train ({count.share:.2%})" in caplog.text
    assert "lora: outside of 'model.body' 30 parameters are frozen" in caplog.text
    assert "lora: trained in full: head" in caplog.text
    assert count.trainable == count.adapter + 12


def test_what_was_frozen_before_is_not_warned_of() -> None:
    module = AdaptedParts("head")
    module.model.requires_grad_(False)
    module.scale.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.apply_lora()
    assert {name.partition(".")[0] for name, p in module.named_parameters() if p.requires_grad} == {"model", "head"}


def test_a_weight_shared_with_the_root_stays_as_the_root_has_it() -> None:
    class Tied(AdaptedParts):
        def __init__(self) -> None:
            super().__init__("body.second")
            self.lora = LoRAConfig(rank=2, targets=["first"], trainable=["second"])
            del self.head, self.scale, self.model["tower"], self.model["norm"]
            self.reader = nn.Linear(8, 2, bias=False)
            body: Any = self.model["body"]
            self.reader.weight = body.second.weight

    module = Tied()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.apply_lora()
    assert module.reader.weight.requires_grad


@FREEZES
def test_what_is_opened_outside_travels_in_checkpoint_and_adapter_folder(tmp_path: Path) -> None:
    module, changed = train(by_mixin, tmp_path, "head", "scale")
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="PEFT cannot load all .* \\(scale, trained beside layers"):
        module.save_adapter(tmp_path / "adapter")  # pyright: ignore[reportCallIssue]
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert {name for name in kept["state_dict"] if "lora_" not in name} == changed
    assert kept["lightning_lora"]["config"]["trainable"] == ["head", "scale"]
    x = torch.randn(3, 4)
    resumed = AdaptedParts("head", "scale")
    toys.trainer(tmp_path).validate(
        resumed, toys.loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False, weights_only=True
    )
    assert torch.equal(resumed(x), module(x))
    bare = Parts()
    load_adapter(bare, tmp_path / "adapter")
    assert torch.equal(bare(x), module(x))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.save_llama(tmp_path_factory.mktemp("llama"))


def test_a_task_that_is_given_a_part_of_the_users_own_opens_it_by_name(llama: Path) -> None:
    from lightning_lora.tasks import CausalLM

    class WithHead(CausalLM):
        def __init__(self, *trainable: str) -> None:
            super().__init__(str(llama), lora=LoRAConfig(rank=2, trainable=trainable))
            self.score = nn.Linear(16, 1)

    module = WithHead("score", "norm")
    module.configure_model()
    trained = {name for name, p in module.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained == {"score.weight", "score.bias", "model.model.norm.weight"}
    with pytest.raises(TargetNotFoundError, match="trainable 'scroe' matches no module"):
        WithHead("scroe").configure_model()
    with pytest.raises(TargetNotFoundError, match="trainable 'scroe' matches no module"):
        CausalLM(str(llama), lora=LoRAConfig(rank=2, trainable=["scroe"]))
