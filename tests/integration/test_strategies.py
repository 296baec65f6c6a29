"""Two processes train what one device trains: twenty steps, unequal tokens, a short window at every epoch's end."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import load_adapter, lora_state_dict
from lightning_lora.files.adapter.folder import read_adapter_folder
from lightning_lora.tasks import CausalLM
from tests.integration.scripts import fsdp2_checks, strategy_runs
from tests.support import toys, warm

pytestmark = [pytest.mark.slow, *toys.expected_warnings]

RUNS = [f"{strategy}/{task}" for strategy in ("ddp", "fsdp2") for task in strategy_runs.TASKS]
# Each way of communicating gradients where it is not the default.
OTHERS = ["fsdp2-chatty/toy-lora", "fsdp2-deferring/toy-full", "tp/llm-lora"]
STARTS = ["ddp/toy-gradient", "fsdp2/toy-gradient", "fsdp2/toy-pissa", "fsdp2/toy-orthogonal", "tp/llm-pissa"]
QUANTISED = [f"ddp/{task}" for task in strategy_runs.QUANTISED if find_spec("bitsandbytes") is not None]
FSDP1 = ["fsdp1/toy-dora", "fsdp1/toy-pissa"]
OF_TWO = [*RUNS, *OTHERS, *STARTS, *QUANTISED, *FSDP1, *(f"checks/{name}" for name in fsdp2_checks.CHECKS)]
"""Runs and checks of two processes."""
OF_ONE = list(dict.fromkeys(f"single/{name.partition('/')[2]}" for name in OF_TWO if not name.startswith("checks")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the llama, and with every run and check that a test has asked for."""
    folder = tmp_path_factory.mktemp("strategies")
    toys.save_llama(folder / "llama")
    return folder


def findings(folder: Path, name: str, ranks: int = 2) -> Any:
    """What a run or a check has found out; it is made once, with those of its strategy in the same processes."""
    path = folder / f"{name}.pt"
    if not path.exists():
        known = {1: OF_ONE, 2: OF_TWO}.get(ranks, [])
        left = [other for other in known if kind(other) == kind(name) and not (folder / f"{other}.pt").exists()]
        names = [name, *(other for other in left if other != name)]
        warm.run_ranks(ranks, strategy_runs.__file__, ranks, folder, *names)
    return torch.load(path)


def kind(name: str) -> str:
    return name.partition("/")[0].partition("-")[0]


def traces(folder: Path, run: str, ranks: int = 2) -> tuple[Any, Any]:
    """What the run has computed, and what one device has."""
    return findings(folder, run, ranks), findings(folder, f"single/{run.partition('/')[2]}", ranks=1)


def assert_same_run(folder: Path, run: str, ranks: int = 2) -> None:
    found, expected = traces(folder, run, ranks)
    assert len(found["losses"]) == strategy_runs.NUM_STEPS
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["norms"], expected["norms"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", [name for name in RUNS if not name.endswith("bf16")] + OTHERS + STARTS + QUANTISED)
def test_two_processes_compute_what_one_device_computes(run: str, folder: Path) -> None:
    assert_same_run(folder, run)


@pytest.mark.parametrize("run", [name for name in RUNS if name.endswith("bf16")])
def test_in_bf16_they_differ_by_its_rounding(run: str, folder: Path) -> None:
    found, expected = traces(folder, run)
    # One unit in the last place of bfloat16 is 2^-8.
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=2**-7, atol=0)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=0, atol=2**-7)


@pytest.mark.parametrize("task", [run.partition("/")[2] for run in FSDP1])
def test_magnitudes_and_kept_starts_under_fsdp1_are_trained_as_on_one_device_and_written_whole(
    task: str, folder: Path
) -> None:
    found, expected = traces(folder, f"fsdp1/{task}")
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=0)
    written = read_adapter_folder(folder / "fsdp1" / f"{task}-adapters" / "last").factors
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, expected["weights"][name], rtol=1e-5, atol=1e-5)
    assert sum(name.endswith("lora_magnitude") for name in written) == (4 if task == "toy-dora" else 0)


def test_a_start_along_the_gradient_is_refused_where_fsdp1_shards(folder: Path) -> None:
    with pytest.raises(AssertionError, match=r"init=.gradient. measures .* FSDP1 shards"):
        findings(folder, "fsdp1/toy-gradient")


def test_the_runs_are_hard_enough(folder: Path) -> None:
    found, expected = traces(folder, "ddp/toy-full")
    (one, other), (single,) = found["counts"], expected["counts"]
    assert len(one) == len(other) == len(single) == 10 * strategy_runs.NUM_EPOCHS
    # Tokens differ between the ranks, and between micro-batches.
    assert all(a != b for a, b in zip(one, other, strict=True))
    assert len(set(single)) > 1
    # The last window of an epoch is a single micro-batch.
    assert 10 % strategy_runs.WINDOW == 1
    assert expected["losses"][-1] < 0.7 * expected["losses"][0]


@pytest.mark.parametrize("run", [name for name in RUNS if name.endswith("clip")])
def test_clipping_is_by_the_norm_over_all_ranks(run: str, folder: Path) -> None:
    for before, after in traces(folder, run)[0]["norms"]:
        assert before > 2 * strategy_runs.CLIP
        assert after == pytest.approx(strategy_runs.CLIP, rel=1e-4)


def test_one_file_is_written_without_gathering_frozen_weights(folder: Path) -> None:
    found = findings(folder, "checks/saving")
    trained, everything = found["sharded"]
    assert trained < everything
    assert found["gathered"] == (trained, everything)
    assert found["state"].keys() == found["everything"].keys() - set(found["frozen"])
    assert all(torch.equal(value, found["everything"][name]) for name, value in found["state"].items())


def test_gradients_are_communicated_once_per_step(folder: Path) -> None:
    # Three groups: two blocks and the rest.
    assert findings(folder, "checks/communication")["counts"] == {None: 3 * 4, False: 3 * 10}


def test_a_checkpoint_inside_a_window_holds_its_gradients(folder: Path) -> None:
    found = findings(folder, "checks/inside")
    assert found["steps"] == 3
    assert toys.same(found["resumed"], found["saved"])
    # A sum of three is communicated as a sum of two and one.
    torch.testing.assert_close(found["saved"], found["plain"], rtol=1e-6, atol=1e-6)


def test_a_run_with_magnitudes_that_are_sharded_goes_on_exactly_inside_a_window(folder: Path) -> None:
    found = findings(folder, "checks/magnitudes")
    assert found["sharded"] == 4
    assert toys.same(found["resumed"], found["saved"])
    # The file is whole: it goes on where nothing is sharded.
    state = torch.load(folder / "magnitudes.ckpt", weights_only=True)["state_dict"]
    assert state["net.blocks.0.up.lora_magnitude"].shape == (12,)


def test_gradients_of_a_window_that_was_never_closed_are_forgotten(folder: Path) -> None:
    found = findings(folder, "checks/again")
    assert found["stopped"] == found["new"]


def test_a_module_that_does_not_shard_itself_is_refused(folder: Path) -> None:
    message = findings(folder, "checks/unsharded")
    assert "Whole does not shard itself: each process would train a copy of its own" in message
    assert "call shard_lora(self.net, self.device_mesh)" in message


def test_two_groups_of_two_processes_that_split_each_layer_compute_what_one_device_computes(folder: Path) -> None:
    assert_same_run(folder, "tp-and-data/llm-lora", ranks=4)


def test_adapters_of_split_layers_are_written_whole(folder: Path) -> None:
    factors = findings(folder, "checks/splitting")["factors"]
    module = CausalLM(str(folder / "llama"))
    module.configure_model()
    load_adapter(module, folder / "split-adapter")
    assert toys.same(lora_state_dict(module), factors)
    saved = torch.load(folder / "split.ckpt", weights_only=True)["state_dict"]
    assert toys.same({name: saved[name] for name in factors}, factors)


REFUSED = {
    "plan": "cannot be split by tensor parallelism: its plan asks for blocks.0.up (colwise_of_some_kind), blocks.1.up",
    "no plan": "Blocks cannot be split by tensor parallelism: there is no plan for it.",
    "full": "tensor parallelism is for adapters, but 2 parameters are trained in full: head.weight, head.bias",
    "all": "tensor parallelism is for adapters, but 11 parameters are trained in full: table.weight",
    "outside": "1 adapted layers are outside the model's tensor-parallel plan: head. Exclude them",
    "dropout": "lora dropout would differ between tensor-parallel processes: set dropout to 0",
    "dora": "dora needs the norms of whole rows, which tensor parallelism splits: set dora to False",
    "odd": "2 tensor-parallel processes cannot divide head (1) evenly: set a tensor_parallel_size",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_is_refused(name: str, folder: Path) -> None:
    assert REFUSED[name] in findings(folder, "checks/splitting")["said"][name]
