"""Arms of a language model, apart and side by side: ranks 1, 8 and 32, each with its rate, order and clipping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import load_adapter, save_adapter
from lightning_lora.errors import GradientError
from lightning_lora.study.bank.bank import Mode
from lightning_lora.study.bank.shared_base import storage_of
from lightning_lora.tasks import CausalLM
from tests.study.bank import arms
from tests.study.bank.arms import THREE, Setting, Trained
from tests.support import tiny_models, toys

pytestmark = toys.expected_warnings
MODES: tuple[Mode, ...] = ("turns", "rows")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return arms.model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def apart(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    return arms.apart(THREE, model, tmp_path_factory.mktemp("apart"))


@pytest.fixture(scope="module")
def together(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Trained]]:
    return {mode: arms.side_by_side(THREE, model, tmp_path_factory.mktemp(mode), mode)[0] for mode in MODES}


def gaps(found: Mapping[str, Trained], expected: Mapping[str, Trained]) -> dict[str, float]:
    return {name: arms.gap(found[name], expected[name]) for name in expected}


def test_arms_in_turns_are_separate_runs_bit_for_bit(
    together: dict[str, dict[str, Trained]], apart: dict[str, Trained]
) -> None:
    assert gaps(together["turns"], apart) == dict.fromkeys(THREE, 0.0)


def test_arms_in_one_batch_are_separate_runs_up_to_rounding(
    together: dict[str, dict[str, Trained]], apart: dict[str, Trained]
) -> None:
    assert max(gaps(together["rows"], apart).values()) < 1e-5


@pytest.mark.slow
def test_arms_in_one_batch_are_separate_runs_in_float64(model: Path, tmp_path: Path) -> None:
    settings = {name: replace(each, trainer={**each.trainer, "precision": "64-true"}) for name, each in THREE.items()}
    expected = arms.apart(settings, model, tmp_path / "apart")
    found, bank = arms.side_by_side(settings, model, tmp_path / "rows", "rows")
    assert max(gaps(found, expected).values()) < 1e-12
    assert bank.shared_passes == (2 * arms.STEPS, 0)
    assert bank.remark == ""


@pytest.mark.parametrize("mode", MODES)
def test_a_single_arm_is_an_ordinary_run_bit_for_bit(
    model: Path, apart: dict[str, Trained], tmp_path: Path, mode: Mode
) -> None:
    found, _ = arms.side_by_side({"eight": THREE["eight"]}, model, tmp_path, mode)
    assert arms.gap(found["eight"], apart["eight"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_other_places_give_the_same_arms(
    model: Path, together: dict[str, dict[str, Trained]], tmp_path: Path, mode: Mode
) -> None:
    found, _ = arms.side_by_side({name: THREE[name] for name in reversed(THREE)}, model, tmp_path, mode)
    assert max(gaps(found, together[mode]).values()) <= (0 if mode == "turns" else 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_an_arm_that_meets_nan_ends_alone(model: Path, apart: dict[str, Trained], tmp_path: Path, mode: Mode) -> None:
    settings = {**THREE, "eight": replace(THREE["eight"], kind=arms.Spoiled)}
    found, _ = arms.side_by_side(settings, model, tmp_path, mode)
    assert isinstance(found["eight"].error, GradientError)
    assert "optimizer step 6" in str(found["eight"].error)
    assert all(factor.isfinite().all() for factor in found["eight"].factors.values())
    for name in ("one", "thirty-two"):
        assert arms.gap(found[name], apart[name]) <= (0 if mode == "turns" else 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_adapter_of_an_arm_loads_alone(
    model: Path, together: dict[str, dict[str, Trained]], tmp_path: Path, mode: Mode
) -> None:
    for name, trained in together[mode].items():
        save_adapter(trained.module, tmp_path / name)
        fresh = CausalLM(str(model), lora=None)
        fresh.configure_model()
        load_adapter(fresh, tmp_path / name)
        with torch.no_grad():
            alone, beside = fresh.eval()(tiny_models.TOKENS), trained.module.eval()(tiny_models.TOKENS)
        assert torch.equal(alone, beside)


@pytest.mark.parametrize("mode", MODES)
def test_the_base_is_in_memory_once(together: dict[str, dict[str, Trained]], model: Path, mode: Mode) -> None:
    modules = [trained.module for trained in together[mode].values()]
    parameters = [p for module in modules for p in module.parameters()]
    stored = {storage_of(p): p.untyped_storage().nbytes() for p in parameters}
    base = sum(p.nbytes for p in modules[0].parameters() if not p.requires_grad)
    adapters = sum(p.nbytes for p in parameters if p.requires_grad)
    assert sum(stored.values()) == base + adapters
    fresh = CausalLM(str(model), lora=None)
    fresh.configure_model()
    frozen = {name: p for name, p in modules[0].named_parameters() if not p.requires_grad}
    assert all(torch.equal(p, frozen[name]) for name, p in fresh.named_parameters() if name in frozen)


OTHERS = {
    # A norm is trained in full in one arm, and the output layer is adapted in another: these are computed apart.
    "norm": Setting(4, 1e-3, seed=4, lora={"trainable": ["model.norm"]}),
    "head": Setting(2, 1e-3, seed=5, lora={"targets": ["lm_head", "embed_tokens"]}),
    "attention": Setting(8, 1e-3, seed=6, lora={"targets": "attention"}, data={"batch_size": 5}),
    "bigger": Setting(2, 1e-3, seed=6, lora={"dora": True}, trainer={"accumulate_grad_batches": 1, "max_steps": 7}),
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_arms_may_differ_in_what_they_adapt_and_how_long_they_train(model: Path, tmp_path: Path, mode: Mode) -> None:
    settings = {
        name: replace(each, trainer={"precision": "64-true", "max_steps": 5, **each.trainer})
        for name, each in OTHERS.items()
    }
    expected = arms.apart(settings, model, tmp_path / "apart")
    found, bank = arms.side_by_side(settings, model, tmp_path / "together", mode)
    assert bank.remark == ""
    assert max(gaps(found, expected).values()) <= (0 if mode == "turns" else 1e-12)


REASONS = {
    "dropout of the adapters": (Setting(2, 1e-3, 1, lora={"dropout": 0.1}), {}, "lora.dropout"),
    "dropout of the base": (Setting(2, 1e-3, 1), {"attention_dropout": 0.2}, "draws random numbers"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "of_model", "reason"), REASONS.values(), ids=list(REASONS))
def test_arms_that_cannot_share_batches_take_turns_and_say_why(
    tmp_path: Path, setting: Setting, of_model: Mapping[str, Any], reason: str
) -> None:
    model = arms.model_folder(tmp_path / "model", **of_model)
    settings = {"one": setting, "two": replace(setting, seed=2)}
    expected = arms.apart(settings, model, tmp_path / "apart")
    found, bank = arms.side_by_side(settings, model, tmp_path / "rows", "rows")
    assert reason in bank.why_turns
    assert bank.remark.startswith("arms take turns, as they cannot share batches: ")
    assert max(gaps(found, expected).values()) < 1e-5
