"""Importing the package is quick, asks nobody, and changes no class of others."""

from __future__ import annotations

import json

import pytest

from tests.support import warm

pytestmark = pytest.mark.slow

SCRIPT = """
import importlib, json, socket, sys, time
import torch, lightning.pytorch

if "all" in sys.argv:
    import datasets, torch.distributed.fsdp, transformers
    import lightning.pytorch.cli, lightning.pytorch.demos.boring_classes, lightning.pytorch.strategies
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralForCausalLM

OTHERS = ("torch", "lightning", "transformers", "datasets", "jsonargparse", "torchmetrics", "safetensors")

def classes():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in OTHERS and "dynamo" not in name and "inductor" not in name:
            for value in list(vars(module).values()):
                if isinstance(value, type) and value.__module__.partition(".")[0] in OTHERS:
                    found[f"{value.__module__}.{value.__qualname__}"] = value
    return found

def contents(kinds):
    return {name: {part: id(member) for part, member in vars(kind).items()} for name, kind in kinds.items()}

def refuse(*arguments, **options):
    raise OSError("the import asks the network")

kinds = classes()
before = contents(kinds)
functions = {name: id(getattr(torch.nn.functional, name)) for name in dir(torch.nn.functional)}
socket.socket.connect = socket.getaddrinfo = refuse
start = time.process_time()
import lightning_lora
for name in lightning_lora.__all__ if "all" in sys.argv else ("LoRAMixin", "LoRAConfig", "inject_lora", "save_adapter"):
    getattr(lightning_lora, name)
importlib.import_module("lightning_lora.callbacks")
seconds = time.process_time() - start
if "all" in sys.argv:
    for room in ("cli", "data", "tasks", "sharding", "study.matched.study"):
        importlib.import_module(f"lightning_lora.{room}")
after = contents(kinds)
changed = [
    f"{name}.{part}"
    for name in before
    for part in before[name].keys() | after[name].keys()
    if before[name].get(part) != after[name].get(part)
]
changed += [name for name in functions if functions[name] != id(getattr(torch.nn.functional, name))]
print(json.dumps({"seconds": seconds, "classes": len(kinds), "changed": changed}))
"""


def imported(*arguments: str) -> dict[str, object]:
    return json.loads(warm.run_cold("-W", "ignore", "-c", SCRIPT, *arguments).stdout.splitlines()[-1])


def test_the_core_is_imported_within_a_second_of_a_processor_beyond_torch_and_lightning() -> None:
    assert imported()["seconds"] < 1.0  # pyright: ignore[reportOperatorIssue]


def test_no_class_of_others_is_changed_by_importing_everything() -> None:
    found = imported("all")
    assert found["classes"] > 1000  # pyright: ignore[reportOperatorIssue]
    assert found["changed"] == []
