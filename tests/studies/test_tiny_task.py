"""A small study from its base to its verdict: the module and the data that the committed study files name."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_lora import LoRAConfig, Study, lora_layers
from studies.modules.base import pretrained
from studies.modules.task import TinyData, TinyTask
from tests.support import toys

pytestmark = [pytest.mark.slow, *toys.expected_warnings]

SIZES = {"width": 16, "num_layers": 1, "base_steps": 8}


def test_a_base_is_trained_once_and_read_the_next_time(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = pretrained(16, 1, steps=8, folder=tmp_path).state_dict()
    assert torch.equal(torch.rand(1), expected), "the random numbers of the run are not used"
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    again = pretrained(16, 1, steps=8, folder=tmp_path).state_dict()
    assert file.stat().st_mtime_ns == written
    assert all(torch.equal(again[name], value) for name, value in first.items())


def test_a_study_of_the_small_modules_goes_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arms = {"full": {"lora": None}, "rank 2": {"lora": LoRAConfig(rank=2)}}
    study = Study(
        partial(TinyTask, **SIZES),
        partial(TinyData, "facts", num_rows=64, exposures=2, batch_size=16),
        arms,
        {"full": [1e-2, 6e-2, 3e-1], "rank 2": [1e-4, 1e-3, 1e-2]},
        trainer={"accelerator": "cpu"},
        out=tmp_path / "study",
    )
    record = study.run()
    assert [verdict["arm"] for verdict in record.verdicts] == ["rank 2"]
    assert all(cell.state == "done" for cell in record.cells)
    trained = {cell.arm: cell.trained_parameters for cell in record.cells_of("rank 2") + record.cells_of("full")}
    assert trained["rank 2"] == 2 * (4 * (16 + 16) + 2 * (16 + 64))
    base = record.base_loss("verdict")
    assert base is not None
    assert all(cell.loss is not None and cell.loss < base for cell in record.cells_of("full", "verdict"))


def test_experts_learn_by_adapters_of_half_the_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = TinyTask(lora=LoRAConfig(rank=2, targets="experts"), num_experts=4, **SIZES)
    data = TinyData("text", num_rows=64, batch_size=16, validation_rows=32)
    Trainer(max_epochs=1, enable_checkpointing=False, **toys.QUIET).fit(module, data)
    layers = lora_layers(module)
    assert len(layers) == 8
    assert {spec.rank for layer in layers.values() for spec in layer.lora_specs.values()} == {1}
    assert any(layer.lora_B.any() for layer in layers.values())
