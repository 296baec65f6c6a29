"""Save under one strategy, go on under another: every pair is right, or refused with a message."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import signal
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from lightning_lora import load_adapter, lora_state_dict
from lightning_lora.checkpoints.consolidate import consolidate
from lightning_lora.files.atomic import sha256
from lightning_lora.files.checkpoint_manifest import examine
from tests.integration.scripts import matrix
from tests.integration.scripts.matrix import LAST, METHODS, SAVED_AT
from tests.support import toys, warm
from tests.support.payload import Payload

pytestmark = [pytest.mark.slow, *toys.expected_warnings]

SHARDS = ("fsdp2-shards", "fsdp1-shards")
SAVED = ("single", "ddp", "fsdp2", "fsdp1", *SHARDS)
LOADED = ("single", "ddp", "fsdp2", "fsdp1")
LLM = ("llm-lora", "llm-full")
DAMAGED = ("truncated", "missing", "flipped")


def cell(method: str, strategy: str, load: str | None = None, save: str | None = None, **other: Any) -> dict[str, Any]:
    """A cell that saves after two steps, or loads and goes on to the fourth."""
    name = f"{method}-{strategy}" if load is None else f"{load.removesuffix('.ckpt')}-to-{strategy}"
    steps = SAVED_AT if load is None else LAST
    return {"cell": name, "method": method, "strategy": strategy, "load": load, "save": save, "steps": steps} | other


def launch(folder: Path, ranks: int, cells: list[dict[str, Any]]) -> None:
    """Run the cells one after the other in ``ranks`` processes.

    Dozens of groups of gloo and their threads come and go here, and once the C library has aborted a rank ("malloc():
    unaligned tcache chunk"); thirty launches and a memory checker did not show it again. All cells run again then, and
    it is told.
    """
    (folder / f"cells-{ranks}.json").write_text(json.dumps(cells))
    done = warm.run_ranks(ranks, matrix.__file__, folder, ranks, check=False)
    if any(rank.returncode == -signal.SIGABRT and "malloc()" in rank.stderr for rank in done):
        print(f"a rank was aborted by the C library: {ranks} ranks run again")
        done = warm.run_ranks(ranks, matrix.__file__, folder, ranks, check=False)
    assert not any(rank.returncode for rank in done), [rank.stderr[-6000:] for rank in done if rank.returncode]


def reads(saved: str, loaded: str) -> bool:
    """Whether ``loaded`` reads what ``saved`` has written: a folder of shards is for its own kind, or for ours."""
    return saved not in SHARDS or loaded in ("single", "ddp") or saved.startswith(loaded)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files, and what every cell has seen: three launches, of two ranks, four and one."""
    folder = tmp_path_factory.mktemp("matrix")
    toys.save_llama(folder / "llama")
    for method in (*METHODS, *LLM):
        matrix.run(folder, 1, cell(method, "single", save=f"{method}-single.ckpt"))
        matrix.run(folder, 1, cell(method, "single", steps=LAST) | {"cell": f"{method}-truth"})
    poison(folder)
    by_position(folder / "full-single.ckpt", folder / "full-positions.ckpt")
    two = [cell(method, saved, save=f"{method}-{saved}.ckpt") for method in METHODS for saved in SAVED[1:]]
    two += [
        cell(method, loaded, f"{method}-{saved}.ckpt") for method in METHODS for saved in SAVED for loaded in LOADED[1:]
    ]
    two += [cell("full", loaded, "full-positions.ckpt") for loaded in LOADED[1:]]
    two += [cell("full", "fsdp1", "payload.ckpt"), cell("lora", "fsdp1-lightning")]
    two += [cell(method, "fsdp1", f"{method}-single.ckpt") for method in LLM]
    two += [
        cell(method, loaded, f"{method}-single.ckpt", steps=0) | {"cell": f"{method}-tested-by-{loaded}"}
        for method in LLM
        for loaded in LOADED[1:]
    ]
    launch(folder, 2, two)
    for method in METHODS:
        for shards in SHARDS:
            consolidate(folder / f"{method}-{shards}.ckpt", folder / f"{method}-{shards}-whole.ckpt")
    kinds = ("fsdp2", "fsdp2-shards")
    four = [
        cell(method, kind, f"{method}-{kind}.ckpt", f"{method}-{kind}-4.ckpt", steps=LAST - 1)
        | {"cell": f"{method}-{kind}-4"}
        for method in METHODS
        for kind in kinds
    ]
    four += [cell(method, "fsdp2", f"{method}-fsdp1-shards-whole.ckpt") for method in METHODS]
    launch(folder, 4, four)
    damage(folder)
    one = [cell(method, "single", f"{method}-{saved}.ckpt") for method in METHODS for saved in SAVED]
    one += [cell(method, "single", f"{method}-{kind}-4.ckpt") for method in METHODS for kind in kinds]
    one += [cell(method, "single", f"{method}-{shards}-whole.ckpt") for method in METHODS for shards in SHARDS]
    one += [cell("lora", "single", f"{kind}.ckpt") for kind in (*DAMAGED, "payload-index")]
    # From here on there is a process group.
    one += [cell(method, "fsdp2-shards", f"{method}-fsdp2-shards-4.ckpt") for method in METHODS]
    one += [cell("lora", "fsdp2", f"{kind}.ckpt") for kind in DAMAGED]
    launch(folder, 1, one)
    return folder


def poison(folder: Path) -> None:
    torch.save({"state_dict": {}, "payload": Payload(folder / "was-run")}, folder / "payload.ckpt")


def by_position(named: Path, positions: Path) -> None:
    """The same checkpoint with optimizer state as plain Lightning writes it on one device."""
    checkpoint = torch.load(named, weights_only=True)
    for state in checkpoint["optimizer_states"]:
        order = {name: number for number, name in enumerate(n for g in state["param_groups"] for n in g["params"])}
        state["state"] = {order[name]: value for name, value in state["state"].items()}
        for group in state["param_groups"]:
            group["params"] = [order[name] for name in group["params"]]
    torch.save(checkpoint, positions)


def damage(folder: Path) -> None:
    for kind in (*DAMAGED, "payload-index"):
        shutil.copytree(folder / "lora-fsdp2-shards.ckpt", folder / f"{kind}.ckpt")
    part = folder / "truncated.ckpt" / "__1_0.distcp"
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    (folder / "missing.ckpt" / "__0_0.distcp").unlink()
    flip_a_bit_of("state_dict.net.head.weight", folder / "flipped.ckpt")
    (folder / "payload-index.ckpt" / ".metadata").write_bytes(pickle.dumps(Payload(folder / "was-run")))


def flip_a_bit_of(tensor: str, shards: Path) -> None:
    places = FileSystemReader(shards).read_metadata().storage_data
    place = next(place for index, place in places.items() if index.fqn == tensor)
    content = bytearray((shards / place.relative_path).read_bytes())
    with zipfile.ZipFile(io.BytesIO(content[place.offset : place.offset + place.length])) as archive:
        record = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
    start = place.offset + record.header_offset
    name, extra = (int.from_bytes(content[start + at : start + at + 2], "little") for at in (26, 28))
    content[start + 30 + name + extra] ^= 1
    (shards / place.relative_path).write_bytes(content)


def seen(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def assert_goes_on(folder: Path, method: str, saved: str, name: str) -> None:
    """The run started with exactly what was saved, and ended where the uninterrupted one did."""
    found = seen(folder, name)
    assert found["error"] is None, found["error"]
    before, truth = seen(folder, f"{method}-{saved}")["seen"]["end"], seen(folder, f"{method}-truth")["seen"]["end"]
    assert before["optimizer"].keys() == before["weights"].keys()
    torch.testing.assert_close(found["seen"]["start"], before, rtol=0, atol=0)
    torch.testing.assert_close(found["seen"]["end"], truth, rtol=1e-5, atol=1e-5)
    assert {float(of["step"]) for of in truth["optimizer"].values()} == {LAST}


@pytest.mark.parametrize("loaded", LOADED)
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_from_what_any_strategy_saved(folder: Path, method: str, saved: str, loaded: str) -> None:
    name = f"{method}-{saved}-to-{loaded}"
    if reads(saved, loaded):
        assert_goes_on(folder, method, saved, name)
    else:
        assert "Missing key in checkpoint state_dict" in seen(folder, name)["error"]
        assert "start" not in seen(folder, name)["seen"]


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp2-shards"])
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_then_four_then_one(folder: Path, method: str, kind: str) -> None:
    two, four = seen(folder, f"{method}-{kind}"), seen(folder, f"{method}-{kind}-4")
    assert four["error"] is None, four["error"]
    torch.testing.assert_close(four["seen"]["start"], two["seen"]["end"], rtol=0, atol=0)
    loaders = ["single"] if kind == "fsdp2" else ["single", "fsdp2-shards"]
    for loaded in loaders:
        assert_goes_on(folder, method, f"{kind}-4", f"{method}-{kind}-4-to-{loaded}")


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_file_made_of_shards_goes_on_elsewhere(folder: Path, method: str, shards: str) -> None:
    assert_goes_on(folder, method, shards, f"{method}-{shards}-whole-to-single")
    if shards == "fsdp1-shards":
        assert_goes_on(folder, method, shards, f"{method}-{shards}-whole-to-fsdp2")
    names = torch.load(folder / f"{method}-{shards}-whole.ckpt", weights_only=True)["state_dict"].keys()
    assert names == torch.load(folder / f"{method}-single.ckpt", weights_only=True)["state_dict"].keys()


@pytest.mark.parametrize("method", METHODS)
def test_files_are_verified_and_hold_plain_types(folder: Path, method: str) -> None:
    for saved in SAVED[:4]:
        path = folder / f"{method}-{saved}.ckpt"
        finding = examine(path)
        assert finding.damage is None
        assert finding.version is not None
        assert finding.version.sha256 == sha256(path)
        assert torch.load(path, weights_only=True)["global_step"] == SAVED_AT
    for shards in SHARDS:
        assert torch.load(folder / f"{method}-{shards}.ckpt" / "meta.pt", weights_only=True)["global_step"] == SAVED_AT


@pytest.mark.parametrize("end", ["", ".weights"])
@pytest.mark.parametrize("saved", SAVED[:4])
@pytest.mark.parametrize("method", METHODS)
def test_a_file_of_any_strategy_loads_without_a_trainer(folder: Path, method: str, saved: str, end: str) -> None:
    path = folder / f"{method}-{saved}.ckpt{end}"
    module = matrix.Toy.load_from_checkpoint(
        path, weights_only=True, map_location="cpu", lora=matrix.LORA if method == "lora" else None
    )
    trained = {name: parameter.data for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert toys.same(trained, seen(folder, f"{method}-{saved}")["seen"]["end"]["weights"])
    assert ("optimizer_states" in torch.load(path, weights_only=True)) == (not end)


@pytest.mark.parametrize("saved", SAVED)
def test_the_adapter_folder_beside_any_checkpoint_loads_on_one_device(folder: Path, saved: str) -> None:
    module = matrix.Toy(None)
    load_adapter(module, folder / f"run-lora-{saved}" / "adapters" / "last")
    weights = seen(folder, f"lora-{saved}")["seen"]["end"]["weights"]
    assert toys.same(
        lora_state_dict(module) | {f"net.head.{n}": p.data for n, p in module.net.head.named_parameters()}, weights
    )


def test_under_fsdp1_the_wrapper_gives_the_adapter_and_the_module_says_so(folder: Path) -> None:
    found = seen(folder, "lora-fsdp1-lightning")
    assert found["error"] is None, found["error"]
    reading, merging = found["seen"]["by hand"]["refusals"]
    assert "FSDP1 has flattened 8 factors" in reading
    assert "Give trainer.model instead of the module (on every rank)" in reading
    assert "is sharded already" in merging
    weights = found["seen"]["end"]["weights"]
    assert toys.same(found["seen"]["by hand"]["read"], {n: w for n, w in weights.items() if "lora_" in n})
    module = matrix.Toy(None)
    load_adapter(module, folder / "run-lora-fsdp1-lightning" / "by-hand")
    assert toys.same(lora_state_dict(module), found["seen"]["by hand"]["read"])


def test_optimizer_state_by_position_is_refused_where_it_would_go_to_other_parameters(folder: Path) -> None:
    assert_goes_on(folder, "full", "single", "full-positions-to-ddp")
    for loaded in ("fsdp2", "fsdp1"):
        found = seen(folder, f"full-positions-to-{loaded}")
        assert "start" not in found["seen"]
        assert "is keyed by position, as plain Lightning writes it" in found["error"]


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_folder_of_shards_is_an_error(folder: Path, kind: str) -> None:
    found = seen(folder, f"{kind}-to-single")
    assert "start" not in found["seen"]
    assert f"{kind}.ckpt cannot be read as a folder of shards" in found["error"]
    by_torch = seen(folder, f"{kind}-to-fsdp2")
    # A flipped bit goes unnoticed where the strategy reads its own folder: torch does not compare its checksums.
    assert (by_torch["error"] is None) == (kind == "flipped")


def test_nothing_is_run_that_a_checkpoint_may_hold(folder: Path) -> None:
    assert "Weights only load failed" in seen(folder, "payload-to-fsdp1")["error"]
    assert "which is not a plain type" in seen(folder, "payload-index-to-single")["error"]
    assert not (folder / "was-run").exists()


@pytest.mark.parametrize("method", LLM)
def test_a_language_model_under_fsdp1_equals_one_device_with_clipping_by_norm(folder: Path, method: str) -> None:
    assert_goes_on(folder, method, "single", f"{method}-single-to-fsdp1")
    found, truth = (seen(folder, f"{method}-{run}")["seen"]["test"] for run in ("single-to-fsdp1", "truth"))
    assert found[0] == pytest.approx(truth[0], rel=1e-5)


@pytest.mark.parametrize("loaded", LOADED[1:])
@pytest.mark.parametrize("method", LLM)
def test_any_strategy_tests_the_weights_of_a_file(folder: Path, method: str, loaded: str) -> None:
    found = seen(folder, f"{method}-tested-by-{loaded}")
    assert found["error"] is None, found["error"]
    assert found["seen"]["test"][0] == pytest.approx(seen(folder, f"{method}-single")["seen"]["test"][0], rel=1e-5)


def test_only_fsdp2_keeps_gradients_of_adapters_alone(folder: Path) -> None:
    used = {name: max(seen(folder, f"lora-{name}")["seen"]["gradient_bytes"]) for name in ("single", "fsdp2", "fsdp1")}
    used["one unit"] = max(seen(folder, "lora-fsdp1-lightning")["seen"]["gradient_bytes"])
    # 169 trained parameters of 2,993; the blocks hold 584 with their adapters. FSDP2 shards along the first axis.
    assert used == {"single": 676, "fsdp2": 356, "fsdp1": (584 // 2 + 5) * 4, "one unit": 5988}
