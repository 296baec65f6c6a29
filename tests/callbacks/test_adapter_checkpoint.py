"""Adapter folders are written during training, and PEFT can load them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_lora import ConfigError, LoRAConfig, load_adapter, lora_state_dict
from lightning_lora.callbacks import AdapterCheckpoint
from lightning_lora.tasks import CausalLM
from tests.support import toys
from tests.support.toys import Toy

pytestmark = toys.expected_warnings


class Scored(Toy):
    """Logs the given scores, one per validation."""

    def __init__(self, *scores: float) -> None:
        super().__init__()
        self.scores = list(scores)

    def on_validation_epoch_end(self) -> None:
        self.log("score", self.scores.pop(0))


def fit(module: LightningModule, folder: Path, callback: AdapterCheckpoint, **options: Any) -> Any:
    ckpt_path = options.pop("ckpt_path", None)
    runner = toys.trainer(folder, callbacks=[callback], **options)
    runner.fit(module, toys.loader(), toys.loader(2), ckpt_path=ckpt_path, weights_only=True)
    return runner


def step(folder: Path) -> int:
    """The optimizer step after which a folder was written."""
    return json.loads((folder / "lightning_lora.json").read_text())["summary"]["step"]


def test_without_arguments_it_writes_last_into_the_run_folder(tmp_path: Path) -> None:
    module = Toy()
    fit(module, tmp_path, AdapterCheckpoint(), logger=CSVLogger(tmp_path, name="run", version="0"))
    folder = tmp_path / "run" / "0" / "adapters"
    assert [path.name for path in folder.iterdir()] == ["last"]
    fresh = Toy()
    load_adapter(fresh, folder / "last")
    assert toys.same(lora_state_dict(fresh), lora_state_dict(module))


def test_without_a_logger_it_writes_below_the_default_folder(tmp_path: Path) -> None:
    fit(Toy(), tmp_path, AdapterCheckpoint())
    assert step(tmp_path / "adapters" / "last") == 4


def test_last_holds_the_end_of_training_when_validation_came_before(tmp_path: Path) -> None:
    module = Toy()
    fit(module, tmp_path, AdapterCheckpoint(str(tmp_path)), val_check_interval=3, max_epochs=1)
    assert step(tmp_path / "last") == 4
    fresh = Toy()
    load_adapter(fresh, tmp_path / "last")
    assert toys.same(lora_state_dict(fresh), lora_state_dict(module))


def test_one_callback_writes_the_end_of_each_of_two_runs(tmp_path: Path) -> None:
    callback = AdapterCheckpoint(str(tmp_path))
    fit(Toy(), tmp_path, callback)
    module = Toy()
    runner = toys.trainer(tmp_path, callbacks=[callback])
    runner.fit(module, toys.loader(seed=7))
    fresh = Toy()
    load_adapter(fresh, tmp_path / "last")
    assert toys.same(lora_state_dict(fresh), lora_state_dict(module))


@pytest.mark.parametrize(
    ("mode", "scores", "best"),
    [
        ("min", (3.0, 1.0, 2.0), 8),
        ("max", (1.0, 2.0, 3.0), 12),
        ("max", (3.0, 1.0, 2.0), 4),
        ("min", (1.0, 1.0, 1.0), 4),
        ("min", (float("nan"), 2.0, 3.0), 8),
        ("max", (2.0, float("nan"), 1.0), 4),
    ],
)
def test_best_is_the_first_of_the_best_scores(mode: str, scores: Any, best: int, tmp_path: Path) -> None:
    callback = AdapterCheckpoint(str(tmp_path), monitor="score", mode=mode)
    fit(Scored(*scores), tmp_path, callback, max_epochs=3)
    assert step(tmp_path / "best") == best
    assert step(tmp_path / "last") == 12


def test_a_resumed_run_keeps_the_best_score(tmp_path: Path) -> None:
    first = AdapterCheckpoint(str(tmp_path), monitor="score")
    fit(Scored(1.0), tmp_path, first).save_checkpoint(tmp_path / "a.ckpt")
    second = AdapterCheckpoint(str(tmp_path), monitor="score")
    fit(Scored(2.0), tmp_path, second, max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert second.best_score == 1.0
    assert (step(tmp_path / "best"), step(tmp_path / "last")) == (4, 8)


def test_unknown_metric_is_refused_with_the_near_one(tmp_path: Path) -> None:
    callback = AdapterCheckpoint(str(tmp_path), monitor="val_los")
    with pytest.raises(ConfigError, match=r"monitors 'val_los', which is not logged; did you mean 'val_loss'\?"):
        fit(Toy(), tmp_path, callback)


@pytest.mark.parametrize("mode", ["minimum", "", None])
def test_unknown_mode_is_refused(mode: Any) -> None:
    with pytest.raises(ConfigError, match="mode must be min or max, got"):
        AdapterCheckpoint(mode=mode)


def test_full_fine_tuning_writes_nothing(tmp_path: Path) -> None:
    module = Toy()
    module.lora = None
    fit(module, tmp_path, AdapterCheckpoint(str(tmp_path / "adapters")))
    assert not (tmp_path / "adapters").exists()


def test_validating_alone_writes_nothing(tmp_path: Path) -> None:
    module = Toy()
    module.configure_model()
    callback = AdapterCheckpoint(str(tmp_path / "adapters"))
    toys.trainer(tmp_path, callbacks=[callback]).validate(module, toys.loader(), verbose=False)
    assert not (tmp_path / "adapters").exists()


def test_metrics_and_progress_are_in_the_manifest(tmp_path: Path) -> None:
    fit(Toy(), tmp_path, AdapterCheckpoint(str(tmp_path)))
    summary = json.loads((tmp_path / "last" / "lightning_lora.json").read_text())["summary"]
    assert summary.keys() == {"step", "epoch", "val_loss"}
    assert summary["val_loss"] > 0


def test_peft_loads_the_folder_of_a_hugging_face_model(llama_folder: Path, tmp_path: Path) -> None:
    module = CausalLM(str(llama_folder), learning_rate=0.01, lora=LoRAConfig(rank=2))
    data = DataLoader(toys.token_rows(), batch_size=4)  # pyright: ignore[reportArgumentType]
    toys.trainer(tmp_path, callbacks=[AdapterCheckpoint(str(tmp_path / "adapters"))]).fit(module, data)
    base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapters" / "last")).eval()
    tokens = torch.arange(6, 18)[None]
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(tokens), other(input_ids=tokens).logits)
    assert all(
        name.startswith("base_model.model.") for name in load_file(tmp_path / "adapters/last/adapter_model.safetensors")
    )
