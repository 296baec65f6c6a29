"""A plan makes the choices of `StepMemory` as a run on that device would, and writes them down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_lora as ll
from lightning_lora.callbacks import BatchSizeMonitor, LoRA
from lightning_lora.cli.embedded import MODEL, TRAIN
from lightning_lora.data import SFTDataModule
from lightning_lora.planning.devices import CUDA_CONTEXT
from lightning_lora.tasks import CausalLM
from tests.planning.test_plan import Tensors
from tests.support import toys

pytestmark = [
    *toys.expected_warnings,
    pytest.mark.filterwarnings("ignore:.*rows longer than max_length"),
    pytest.mark.filterwarnings("ignore:rank [0-9]+ is more than"),
]
FAST = {"gate": "keep", "head_rows": 4096, "activation_checkpointing": False}


def planned(memory: int | None = None, trainer: Any = None, **settings: Any) -> ll.Plan:
    module = CausalLM(str(MODEL), lora=ll.LoRAConfig(rank=8), **settings)
    data = SFTDataModule(str(TRAIN), max_rows=24, max_length=96, batch_size=4)
    named = None if memory is None else f"{memory}B"
    return ll.plan(module, data, memory=named, calibrate=False, target_batch_size=4, trainer=trainer)


def total(plan: ll.Plan) -> int:
    memory = plan.memory[plan.method]
    assert memory is not None
    return memory.total


@pytest.mark.slow
def test_the_choice_is_traced_told_and_written(tmp_path: Path) -> None:
    fast = planned(10**11)
    assert fast.settings["step_memory"] == FAST == fast.to_dict()["settings"]["step_memory"]
    assert "gates kept, head chunks of 4,096 rows, no activation checkpointing" in " ".join(str(fast).split())
    written = yaml.safe_load(fast.write_config(tmp_path / "plan.yaml").read_text())
    assert written["model"]["init_args"]["step_memory"] == FAST
    # The settings of the config give the trace that the plan tells.
    again = planned(10**11, step_memory=FAST)
    assert (again.memory["lora"], again.settings["step_memory"]) == (fast.memory["lora"], None)
    # A device with a little less room than the fastest needs.
    less = planned(int((total(fast) + 1) / 0.9) - 10_000)
    assert less.settings["step_memory"] != FAST
    assert CUDA_CONTEXT < total(less) < total(fast)


@pytest.mark.slow
def test_a_cpu_and_what_the_user_has_set_leave_nothing_to_choose() -> None:
    assert planned().settings["step_memory"] is None
    found = planned(10**11, step_memory={"gate": "recompute"}, activation_checkpointing=True)
    assert found.settings["step_memory"] == {"gate": "recompute", "head_rows": 4096, "activation_checkpointing": True}
    watched = planned(10**11, {"callbacks": [BatchSizeMonitor()]})
    assert watched.settings["step_memory"] == FAST


@pytest.mark.slow
def test_a_module_of_ones_own_gets_its_gate_by_the_callback(tmp_path: Path) -> None:
    import torch

    data = Tensors(torch.randn(64, 2))
    callback = LoRA(ll.LoRAConfig(rank=1))
    plan = ll.plan(toys.Plain(), data, memory="8GB", calibrate=False, trainer={"callbacks": [callback]})
    assert plan.settings["step_memory"] == {"gate": "keep"}
