"""What is wrong with the module of an arm is found before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_lora as ll
from lightning_lora import Study
from lightning_lora.callbacks import LoRA
from lightning_lora.errors import ConfigError
from lightning_lora.study.matched.checks.built import BuiltArm, build_arm, check_kept
from tests.study.matched.learner import Learner, Rows
from tests.support import tiny_models, toys

MISTAKES = {
    "targets": ({"targets": ["lyer"]}, "target 'lyer' matches none"),
    "exclude": ({"exclude": ["lyer"]}, "exclude 'lyer' matches none"),
    "trainable": ({"trainable": ["head"]}, "trainable 'head' matches no module"),
    "rank_pattern": ({"rank_pattern": {"head": 2}}, "rank_pattern 'head' matches none"),
    "alpha_pattern": ({"alpha_pattern": {"head": 2.0}}, "alpha_pattern 'head' matches none"),
    "rates": ({"lr_multiplier_pattern": {"head": 2.0}}, "lr_multiplier_pattern 'head' matches neither"),
    "adapt_head": ({"adapt_head": True}, "has no head layer"),
    "adapt_embeddings": ({"adapt_embeddings": True}, "has no embedding layer"),
}


class Untrainable(Learner):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        raise AssertionError("something was trained")


@pytest.mark.parametrize(("wrong", "message"), MISTAKES.values(), ids=list(MISTAKES))
def test_settings_that_match_nothing_are_one_error_before_anything_is_trained(
    wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    arms = {"full": {"lora": None}, "fine": {"lora": {"rank": 2}}, "last": {"lora": wrong}}
    study = Study(Untrainable, Rows, arms, 1e-3, out=tmp_path / "out", trainer={"accelerator": "cpu"})
    with pytest.raises(ConfigError, match=rf"^arm 'last': .*{message}"):
        study.run()
    assert not (tmp_path / "out").exists()


def test_a_callback_that_matches_nothing_is_found_too(tmp_path: Path) -> None:
    wrong = {"trainer": {"callbacks": [LoRA({"targets": ["lyer"]})]}}

    class Plain(toys.Plain):
        def __init__(self, learning_rate: float) -> None:
            super().__init__()

    study = Study(Plain, None, {"full": {}, "last": wrong}, 1e-3, out=tmp_path / "out")
    with pytest.raises(ConfigError, match=r"^arm 'last': target 'lyer' matches none"):
        study.run()


def test_a_module_that_cannot_be_made_is_one_error() -> None:
    def broken() -> Any:
        raise KeyError("widht")

    with pytest.raises(ConfigError, match="arm 'wide': its module cannot be made: KeyError: 'widht'"):
        build_arm("wide", broken)


def test_building_leaves_random_numbers_and_the_module_as_they_are() -> None:
    module = Learner(1e-3, ll.LoRAConfig(rank=2))
    before, draws = dict(module.named_parameters()), torch.get_rng_state()
    assert build_arm("a", lambda: module) == BuiltArm("Learner", is_adapted=True, has_model=False)
    assert module.state_dict().keys() == before.keys()
    assert torch.equal(torch.get_rng_state(), draws)


def test_only_a_run_tells_of_a_module_that_is_built_from_values() -> None:
    class Valued(Learner):
        def configure_model(self) -> None:
            width = int(self.layer.weight.detach().numpy().sum())
            self.more = torch.nn.Linear(width + 1, 1)
            super().configure_model()

    assert build_arm("a", lambda: Valued(1e-3, None)) is None


def test_models_that_cannot_be_kept_are_refused_before_the_study() -> None:
    class OfTransformers(Learner):
        def configure_model(self) -> None:
            self.model = tiny_models.llama()
            super().configure_model()

    with pytest.raises(ConfigError, match="--keep-models: arm 'full' trains Learner in full, which holds no"):
        check_kept("full", build_arm("full", lambda: Learner(1e-3, None)))
    check_kept("rank 2", build_arm("rank 2", lambda: Learner(1e-3, ll.LoRAConfig(rank=2))))
    check_kept("full", build_arm("full", lambda: OfTransformers(1e-3, None)))
