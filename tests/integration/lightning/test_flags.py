"""Each argument of the Trainer with adapters, by the mixin and by the callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from lightning_lora import lora_state_dict
from tests.integration.lightning import adapted_runs
from tests.integration.lightning.adapted_runs import WAYS
from tests.support import toys

pytestmark = [
    pytest.mark.slow,
    *toys.expected_warnings,
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed"),
    pytest.mark.filterwarnings("ignore:You are trying to `self.log\\(\\)` but `Trainer\\(barebones=True\\)`"),
]
ways = pytest.mark.parametrize("way", WAYS)

# Arguments under which the run is, bit for bit, the one without them.
NEUTRAL: list[dict[str, Any]] = [
    {"accelerator": "auto"},
    {"strategy": "auto"},
    {"devices": "auto"},
    {"num_nodes": 1},
    {"precision": "32-true"},
    {"callbacks": []},
    {"logger": True},
    {"logger": False},
    {"min_epochs": 1},
    {"min_steps": 2},
    {"max_time": "00:00:05:00"},
    {"limit_val_batches": 1},
    {"limit_test_batches": 1},
    {"limit_predict_batches": 1},
    {"val_check_interval": 2},
    {"val_check_interval": "00:00:00:01"},
    {"val_check_interval": 2, "check_val_every_n_epoch": None},
    {"num_sanity_val_steps": 2},
    {"log_every_n_steps": 1},
    {"enable_checkpointing": True},
    {"enable_progress_bar": True},
    {"enable_model_summary": True},
    {"gradient_clip_val": 1e6},
    {"gradient_clip_val": 1e6, "gradient_clip_algorithm": "value"},
    {"deterministic": True},
    {"benchmark": False},
    {"inference_mode": False},
    {"use_distributed_sampler": False},
    {"profiler": "simple"},
    {"profiler": "advanced"},
    {"detect_anomaly": True},
    {"plugins": []},
    {"sync_batchnorm": True},
    {"reload_dataloaders_every_n_epochs": 1},
    {"default_root_dir": "elsewhere"},
    {"enable_autolog_hparams": False},
    {"model_registry": "models"},
]
# Arguments that change the run, and the number of optimizer steps that it has then, of 4.
CHANGING: list[tuple[dict[str, Any], int]] = [
    ({"fast_dev_run": True}, 1),
    ({"max_epochs": 2}, 8),
    ({"max_epochs": -1, "max_steps": 3}, 3),
    ({"limit_train_batches": 2}, 2),
    ({"overfit_batches": 1}, 1),
    ({"accumulate_grad_batches": 2}, 2),
    ({"gradient_clip_val": 0.01}, 4),
    ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, 4),
    ({"precision": "bf16-mixed"}, 4),
    ({"precision": "bf16-true"}, 4),
    ({"precision": "64-true"}, 4),
    ({"precision": "16-true"}, 4),
]


def run(way: str, folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    added: list[Callback] = options.pop("callbacks", [])
    return adapted_runs.fit(way, folder, *added, **options)


def label(options: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in options.items())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The adapters of a run without arguments, for each way."""
    return {way: lora_state_dict(run(way, tmp_path_factory.mktemp(way)).lightning_module) for way in WAYS}


@ways
@pytest.mark.parametrize("options", NEUTRAL, ids=label)
def test_an_argument_that_is_not_about_weights_leaves_the_run_as_it_is(
    way: str, options: dict[str, Any], alone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = run(way, tmp_path, **options)
    assert trainer.global_step == 4
    assert toys.same(lora_state_dict(trainer.lightning_module), alone[way])
    torch.use_deterministic_algorithms(False)


@ways
@pytest.mark.parametrize(("options", "steps"), CHANGING, ids=[label(options) for options, _ in CHANGING])
def test_an_argument_that_changes_the_run_does_what_it_says(
    way: str, options: dict[str, Any], steps: int, alone: dict[str, Any], tmp_path: Path
) -> None:
    trainer = run(way, tmp_path, **options)
    assert trainer.global_step == steps
    assert not toys.same(lora_state_dict(trainer.lightning_module), alone[way])


@ways
def test_barebones_trains_the_same(way: str, alone: dict[str, Any], tmp_path: Path) -> None:
    quiet = {name: None for name in ("logger", "enable_progress_bar", "enable_model_summary", "num_sanity_val_steps")}
    trainer = run(way, tmp_path, barebones=True, enable_checkpointing=None, **quiet)
    assert toys.same(lora_state_dict(trainer.lightning_module), alone[way])


@ways
def test_all_of_fit_validate_test_and_predict_give_the_adapted_module(way: str, tmp_path: Path) -> None:
    trainer = run(way, tmp_path, logger=CSVLogger(tmp_path))
    module: Any = trainer.lightning_module
    validated = trainer.validate(module, verbose=False)
    assert validated == trainer.test(module, verbose=False)
    predicted = trainer.predict(module)
    assert torch.equal(predicted[0], module(next(iter(toys.loader()))[0]))
