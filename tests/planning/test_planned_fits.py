"""A run of the YAML of a plan has the steps, tokens and parameters that the plan says, exactly."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_lora as ll
from lightning_lora.callbacks import PlannedRun
from lightning_lora.cli.lora_cli import LoRACLI
from lightning_lora.data import SFTDataModule
from lightning_lora.files.events import read_events
from lightning_lora.planning.advice.epoch import Epoch, RunLength
from lightning_lora.planning.advice.run_tokens import run_tokens
from lightning_lora.planning.advice.settings import PlannedBatch
from lightning_lora.planning.count_data import count_data
from lightning_lora.planning.plan import Plan
from lightning_lora.planning.set_up_data import set_up
from lightning_lora.tasks import CausalLM
from lightning_lora.trainer_access import found
from tests.support import toys

pytestmark = [
    pytest.mark.slow,
    *toys.expected_warnings,
    pytest.mark.filterwarnings("ignore:.*longer than max_length|.*nothing to learn|.*are cut"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:rank [0-9]+ is more than"),
]

ROWS = 23
EXACT = ("steps", "tokens", "total_tokens", "trained_parameters")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.save_llama(tmp_path_factory.mktemp("planned") / "llama")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of different lengths; two have nothing to learn."""
    file = tmp_path_factory.mktemp("planned_rows") / "rows.jsonl"
    lines = [{"question": "what " * (1 + n % 6), "answer": str(n) * (1 + n % 4)} for n in range(ROWS)]
    lines += [{"question": "why " * 80, "answer": "cut off"}] * 2
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def planned(folder: Path, llama: Path, rows: Path, data: dict[str, Any], **options: Any) -> Plan:
    module = CausalLM(str(llama), lora=ll.LoRAConfig(rank=4))
    source = SFTDataModule(str(rows), max_length=60, **data)
    made = ll.plan(module, source, calibrate=False, **options)
    made.write_config(folder / "plan.yaml")
    return made


def fitted(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> PlannedRun:
    monkeypatch.chdir(folder)
    options = [
        "--trainer.default_root_dir=.",
        "--trainer.enable_progress_bar=false",
        "--trainer.logger=false",
        "--trainer.enable_model_summary=false",
    ]
    monkeypatch.setattr(sys, "argv", ["lightning-lora", "fit", "--config", "plan.yaml", *options, *arguments])
    callback = found(LoRACLI().trainer, PlannedRun)
    assert callback is not None
    return callback


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "padded, the last batch has fewer rows": ({}, {"max_epochs": 2}),
    "packed": ({"packing": True}, {"max_epochs": 2}),
    "packed by batch": ({"packing": "batch"}, {}),
    "max_steps within the second epoch": ({}, {"max_steps": 4}),
    "max_steps of packs": ({"packing": True}, {"max_steps": 5}),
    "a part of each epoch": ({}, {"limit_train_batches": 2, "max_epochs": 2}),
    "held-out rows": ({"validation_share": 0.2}, {"val_check_interval": 0.5}),
}


def counted(module: CausalLM, data: SFTDataModule, batch: PlannedBatch, trainer: dict[str, Any]) -> dict[str, int]:
    """The tokens of a run, as a plan counts them."""
    counts = count_data(data, module)
    with set_up(data, module) as ready:
        epoch, length = Epoch.of(ready.train_dataloader()), RunLength.of(trainer)
        steps = length.steps(epoch, batch.batch_size, batch.accumulate_grad_batches, batch.devices)
        return {"steps": steps} | run_tokens(ready, counts, epoch, length, replace(batch, steps=steps))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", RUNS)
def test_the_tokens_of_a_run_are_counted_before_it(
    name: str, accumulation: int, llama: Path, rows: Path, tmp_path: Path
) -> None:
    arguments, options = RUNS[name]
    options = {"max_epochs": -1 if "max_steps" in options else 1} | options
    size = 2 if arguments.get("packing") is True else 5
    module = CausalLM(str(llama), lora=ll.LoRAConfig(rank=4))
    data = SFTDataModule(str(rows), max_length=60, batch_size=size, **arguments)
    expected = counted(module, data, PlannedBatch(size, accumulation, 1, 0), options)
    run = PlannedRun(**expected)
    runner = toys.trainer(tmp_path, **options, accumulate_grad_batches=accumulation, callbacks=[run])
    runner.fit(module, datamodule=data)
    assert expected == {each: run.measured[each] for each in ("steps", "tokens", "total_tokens")}
    assert expected["total_tokens"] > expected["tokens"] > expected["steps"] > 0


def test_micro_batches_that_fit_into_less_memory_accumulate_to_the_same_run(
    llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = {"precision": "32-true", "accelerator": "cpu"}
    whole = planned(tmp_path, llama, rows, {}, trainer=trainer, target_batch_size=8)
    memory = whole.memory[whole.method]
    assert memory is not None
    small = f"{memory.total - 1}B"
    plan = planned(tmp_path, llama, rows, {}, trainer=trainer, target_batch_size=8, memory=small)
    assert plan.settings["accumulate_grad_batches"] > 1
    run = fitted(tmp_path, monkeypatch)
    assert {each: run.measured[each] for each in EXACT} == {each: run.planned[each] for each in EXACT}
    (event,) = (event for event in read_events(tmp_path) if event["event"] == "planned_and_measured")
    assert event["planned"]["tokens"] == event["measured"]["tokens"]
    assert plan.settings["steps"] == whole.settings["steps"]


RANKS = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from lightning_lora.callbacks import PlannedRun
from lightning_lora.data import SFTDataModule
from lightning_lora.planning.advice.settings import PlannedBatch
from lightning_lora.tasks import CausalLM
from tests.planning.test_planned_fits import counted
from tests.support import toys
for packing in (False, True):
    module = CausalLM(sys.argv[1], lora={"rank": 2})
    data = SFTDataModule(sys.argv[2], max_length=60, batch_size=2, packing=packing)
    expected = counted(module, data, PlannedBatch(2, 2, 2, 0), {"max_epochs": 2})
    run = PlannedRun()
    options = dict(max_epochs=2, accumulate_grad_batches=2, devices=2, strategy="ddp")
    toys.trainer(Path(sys.argv[3]), callbacks=[run], **options).fit(module, datamodule=data)
    assert expected == {name: run.measured[name] for name in expected}, (expected, run.measured)
"""


def test_two_processes_have_the_tokens_that_were_counted(llama: Path, rows: Path, tmp_path: Path) -> None:
    """Rows that a sampler repeats, so that both have equally many, count."""
    toys.run_python(RANKS, llama, rows, tmp_path, ranks=2)


def test_every_value_of_the_yaml_says_where_it_comes_from(
    llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = {"gradient_clip_val": 1.0, "check_val_every_n_epoch": None, "val_check_interval": 3, "max_steps": 4}
    planned(tmp_path, llama, rows, {"max_rows": 20, "validation_share": 0.2}, trainer=trainer, target_batch_size=8)
    text = (tmp_path / "plan.yaml").read_text()
    written = yaml.safe_load(text)
    assert {name: written["trainer"][name] for name in trainer} == trainer
    lines = [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    told = [index for index, line in enumerate(text.splitlines()) if line.strip().startswith("#")]
    assert told
    bare = [line for line in lines if not line.rstrip().endswith(":") and "# as given" not in line]
    # What has no remark of its own stands below a comment that speaks of it.
    for name in ("learning_rate", "batch_size", "accumulate_grad_batches", "devices", "precision", "strategy"):
        (place,) = (index for index, line in enumerate(text.splitlines()) if line.strip().startswith(f"{name}:"))
        assert place - 1 in told, name
    assert not any("gradient_clip_val" in line for line in bare)
    assert fitted(tmp_path, monkeypatch).measured["steps"] == 4
