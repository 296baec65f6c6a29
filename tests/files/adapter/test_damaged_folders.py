"""A damaged or foreign adapter folder is refused with its reason, and changes nothing."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import AdapterFileError, LoRAConfig, LoRAError, inject_lora, load_adapter
from lightning_lora.files.adapter.folder import read_adapter_folder
from lightning_lora.files.adapter.manifest import MANIFEST_FILE as MANIFEST
from lightning_lora.files.adapter.peft_format import CONFIG_FILE as SETTINGS
from lightning_lora.files.adapter.peft_format import PREFIX
from lightning_lora.files.adapter.peft_format import TENSOR_FILE as TENSORS
from tests.support.tiny_models import llama, portrait
from tests.support.toys import tree


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return Path.touch, (self.sentinel,)


def cut(size: Callable[[int], int]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / TENSORS).read_bytes()
        (folder / TENSORS).write_bytes(content[: size(len(content))])

    return damage


def flip(folder: Path) -> None:
    content = bytearray((folder / TENSORS).read_bytes())
    content[-5] ^= 1
    (folder / TENSORS).write_bytes(content)


def rewrite(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=name == SETTINGS) + "\n")

    return damage


def retensor(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Change the tensors of a folder that no manifest protects."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        change(tensors)
        (folder / MANIFEST).unlink()
        save_file(tensors, folder / TENSORS)

    return damage


def pickled(folder: Path) -> None:
    (folder / TENSORS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload(folder.parent / "sentinel")))


def pickled_as_safetensors(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / TENSORS).write_bytes(pickle.dumps(Payload(folder.parent / "sentinel")))


NAME = f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight"


def renamed(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    for name in list(tensors):
        tensors[name.replace(old, new)] = tensors.pop(name)


class Damaged(NamedTuple):
    name: str
    damage: Callable[[Path], Any]
    words: tuple[str, ...]


# Reading fails: the module is not reached.
DAMAGED = [
    Damaged("B35 no bytes", cut(lambda size: 0), (TENSORS, "expected", "found 0")),
    Damaged("B36 cut at 4", cut(lambda size: 4), (TENSORS, "incomplete", "found 4")),
    Damaged("B36 cut at 20", cut(lambda size: 20), (TENSORS, "incomplete", "found 20")),
    Damaged("B36 cut in half", cut(lambda size: size // 2), (TENSORS, "incomplete", "expected")),
    Damaged("B36 last byte lost", cut(lambda size: size - 1), (TENSORS, "incomplete", "expected")),
    Damaged(
        "B36 without manifest",
        lambda f: ((f / MANIFEST).unlink(), cut(lambda size: size - 1)(f)),
        (TENSORS, "expected"),
    ),
    Damaged("one bit flipped", flip, (TENSORS, "changed after it was saved")),
    Damaged("B44 NaN", retensor(lambda t: t[NAME].fill_(torch.nan)), ("up_proj.lora_A holds 128 NaN", "of 128")),
    Damaged("B44 one infinity", retensor(lambda t: t[NAME].view(-1)[7].fill_(torch.inf)), ("holds 1 NaN or",)),
    Damaged("B45 empty tensor", retensor(lambda t: t.update({NAME: torch.zeros(0, 32)})), ("is empty, shape (0, 32)",)),
    Damaged("B41 no tensors", retensor(lambda t: t.clear()), ("holds no tensors",)),
    Damaged("B46 one factor missing", retensor(lambda t: t.pop(NAME)), ("A missing, B (48, 4)",)),
    Damaged("B46 no prefix", retensor(lambda t: renamed(t, PREFIX, "")), ("does not start with 'base_model.model.'",)),
    Damaged(
        "B46 factors of two ranks",
        retensor(lambda t: t.update({NAME: torch.zeros(3, 32)})),
        ("do not fit: A (3, 32), B (48, 4)",),
    ),
    Damaged("B46 one dimension", retensor(lambda t: t.update({NAME: torch.zeros(128)})), ("A (128,), B (48, 4)",)),
    Damaged("B50 alpha edited", rewrite(SETTINGS, lambda c: c.update(lora_alpha=64)), (SETTINGS, "was changed after")),
    Damaged("B50 rank edited", rewrite(SETTINGS, lambda c: c.update(r=16)), (SETTINGS, "expected", "bytes")),
    Damaged(
        "B50 alpha edited in the manifest",
        rewrite(MANIFEST, lambda c: c["layers"]["model.layers.0.mlp.up_proj"].update(alpha=64.0)),
        ("manifest and config disagree about alpha", "up_proj has 64.0, not 32"),
    ),
    Damaged(
        "B50 scaling edited in the manifest",
        rewrite(MANIFEST, lambda c: c["config"].update(scaling="rslora")),
        ("manifest and config disagree", "use_rslora is False"),
    ),
    Damaged(
        "B50 rank edited in the manifest",
        rewrite(MANIFEST, lambda c: c["layers"]["model.layers.0.mlp.up_proj"].update(rank=2)),
        (MANIFEST, "does not describe the tensors"),
    ),
    Damaged("B51 newer format", rewrite(MANIFEST, lambda c: c.update(format=2)), ("format 2, newer than 1", "update")),
    Damaged("B51 not JSON", lambda f: (f / MANIFEST).write_text("{"), (MANIFEST, "not readable JSON")),
    Damaged("B51 a list", lambda f: (f / MANIFEST).write_text("[]"), (MANIFEST, "JSON object, found list")),
    Damaged("B51 an empty object", lambda f: (f / MANIFEST).write_text("{}"), (MANIFEST, "not a lightning-lora")),
    Damaged("B51 no hashes", rewrite(MANIFEST, lambda c: c["files"].clear()), (MANIFEST, "not a lightning-lora")),
    Damaged("B51 damaged hashes", rewrite(MANIFEST, lambda c: c["files"].update({TENSORS: 7})), (MANIFEST, "manifest")),
    Damaged("B51 a foreign file", rewrite(MANIFEST, lambda c: c["files"].update(x=7)), (MANIFEST, "manifest")),
    Damaged("B51 empty layers", rewrite(MANIFEST, lambda c: c.update(layers={})), (MANIFEST, "does not desc")),
    Damaged("B51 following", rewrite(MANIFEST, lambda c: c.update(following=7)), (MANIFEST, "does not desc")),
    Damaged("B51 no layers", rewrite(MANIFEST, lambda c: c.pop("layers")), (MANIFEST, "does not describe")),
    Damaged("B51 no fingerprint", rewrite(MANIFEST, lambda c: c.pop("base_fingerprint")), (MANIFEST, "does not desc")),
    Damaged(
        "B51 no values", rewrite(MANIFEST, lambda c: c["base"]["lm_head.weight"].pop("values")), (MANIFEST, "desc")
    ),
    Damaged("B51 no table of the base", rewrite(MANIFEST, lambda c: c.update(base=[])), (MANIFEST, "does not desc")),
    Damaged("B51 no settings", rewrite(MANIFEST, lambda c: c.pop("config")), (MANIFEST, "does not describe")),
    Damaged("B51 unknown setting", rewrite(MANIFEST, lambda c: c["config"].update(rnak=1)), ("no setting 'rnak'",)),
    Damaged(
        "B57 a file elsewhere",
        rewrite(MANIFEST, lambda c: c["files"].update({"../x": {"bytes": 0, "sha256": ""}})),
        ("lacks '../x'",),
    ),
    Damaged("B52 pickled", pickled, ("adapter_model.bin", "never opened", "safetensors")),
    Damaged("B52 pickled under another name", pickled_as_safetensors, (TENSORS,)),
    Damaged("no settings", lambda f: (f / SETTINGS).unlink(), ("is not an adapter", f"no {SETTINGS}")),
    Damaged("no tensors", lambda f: (f / TENSORS).unlink(), (f"has no {TENSORS}",)),
    Damaged(
        "settings not JSON",
        lambda f: ((f / MANIFEST).unlink(), (f / SETTINGS).write_text("r: 8")),
        (SETTINGS, "JSON"),
    ),
    Damaged(
        "settings not text",
        lambda f: ((f / MANIFEST).unlink(), (f / SETTINGS).write_bytes(b"\xff\xfe")),
        (SETTINGS,),
    ),
    Damaged(
        "settings with a broken pattern",
        lambda f: (
            rewrite(SETTINGS, lambda c: c.update(target_modules="(", target_parameters=["x"]))(f),
            (f / MANIFEST).unlink(),
        ),
        ("'(' is not a regular expression",),
    ),
    Damaged(
        "settings nested without end",
        lambda f: ((f / MANIFEST).unlink(), (f / SETTINGS).write_text("[" * 200_000)),
        (SETTINGS, "not readable JSON"),
    ),
    Damaged("absent", lambda f: shutil.rmtree(f), ("adapter is absent",)),
    Damaged("B58 a file", lambda f: (shutil.rmtree(f), f.write_text("")), ("adapter is a file",)),
    Damaged(
        "B58 a folder within",
        lambda f: ((f / TENSORS).unlink(), (f / TENSORS).mkdir()),
        (f"has no {TENSORS}",),
    ),
    Damaged("empty folder", lambda f: (shutil.rmtree(f), f.mkdir()), ("is not an adapter", "only nothing")),
]
# The folder can be read, and does not fit the module.
UNFITTING = [
    Damaged(
        "B46 a layer missing",
        retensor(lambda t: [t.pop(name) for name in list(t) if "layers.0.mlp.up_proj" in name]),
        ("targets 1 layers that its tensors leave out", "model.layers.0.mlp.up_proj"),
    ),
    Damaged(
        "B46 an unknown tensor",
        retensor(lambda t: t.update({f"{PREFIX}model.other.weight": torch.zeros(2)})),
        ("does not fit this module", "model.other.weight"),
    ),
    Damaged(
        "B46 an unknown layer",
        retensor(lambda t: renamed(t, "layers.1.", "layers.7.")),
        ("7 of 14 adapted layers do not exist in LlamaForCausalLM", "model.layers.7.mlp.down_proj", "and 2 more"),
    ),
    Damaged(
        "B46 one level too many",
        retensor(lambda t: renamed(t, PREFIX, f"{PREFIX}model.")),
        ("14 of 14 adapted layers do not exist", "model.model.layers.0"),
    ),
    Damaged(
        "B46 wrong width",
        retensor(lambda t: t.update({NAME: torch.zeros(4, 31)})),
        ("1 of 14 layers disagree", "up_proj maps (32, 48), the adapter (31, 48)"),
    ),
    Damaged(
        "B46 an adapted norm",
        lambda f: (
            rewrite(SETTINGS, lambda c: c["target_modules"].append("norm"))(f),
            retensor(lambda t: renamed(t, "layers.0.mlp.up_proj", "norm"))(f),
        ),
        ("model.norm is a LlamaRMSNorm, which cannot be adapted",),
    ),
]


def refuse(model: nn.Module, folder: Path) -> str:
    """Load a folder that must be refused, see that nothing has changed, and return the message."""
    before, hashes = portrait(model), tree(folder.parent)
    with pytest.raises(AdapterFileError) as error:
        load_adapter(model, folder, allow_other_base=True)
    assert isinstance(error.value, LoRAError)
    assert (portrait(model), tree(folder.parent)) == (before, hashes)
    assert not (folder.parent / "sentinel").exists()
    return str(error.value)


@pytest.mark.parametrize("row", DAMAGED, ids=lambda row: row.name)
def test_a_damaged_folder_changes_nothing(row: Damaged, folder: Path) -> None:
    row.damage(folder)
    message = refuse(llama(), folder)
    for word in row.words:
        assert word in message
    with pytest.raises(AdapterFileError, match=re.escape(message)):
        read_adapter_folder(folder)


@pytest.mark.parametrize("row", UNFITTING, ids=lambda row: row.name)
@pytest.mark.parametrize("ready", [False, True])
def test_a_folder_that_does_not_fit_changes_nothing(row: Damaged, ready: bool, folder: Path) -> None:
    model = llama()
    if ready:
        inject_lora(model, LoRAConfig(rank=4))
    row.damage(folder)
    read_adapter_folder(folder)
    message = refuse(model, folder)
    # What fits depends on what is there: into an adapted module names are compared, not layers found.
    for word in row.words if not ready else ("does not fit this module",):
        assert word in message
