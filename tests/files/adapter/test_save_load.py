"""Adapter folders: what is in them, and that damaged or foreign ones change nothing."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import (
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    LoRAConfig,
    LoRAError,
    inject_lora,
    load_adapter,
    lora_layers,
    lora_state_dict,
    merge_lora,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.files.adapter.folder import read_adapter_folder
from lightning_lora.files.adapter.peft_format import PREFIX
from lightning_lora.files.merge.merged_model import save_merged
from lightning_lora.lora.fingerprint import base_digests, fingerprint
from tests.support.tiny_models import Net, gpt2, llama, llama_classifier, logits, mlp, portrait, tree, wake

TENSORS, SETTINGS, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "lightning_lora.json"


def adapted(build: Callable[..., Any] = llama, **settings: Any) -> Any:
    model = build()
    inject_lora(model, LoRAConfig.from_dict({"rank": 4, **settings}))
    wake(model)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of the tiny Llama."""
    return save_adapter(adapted(), tmp_path / "adapter")


def without_manifest() -> Any:
    return pytest.warns(UserWarning, match=r"has no lightning_lora\.json")


# What is written.


def test_a_folder_holds_pefts_two_files_a_manifest_and_a_card(tmp_path: Path) -> None:
    model = adapted()
    path = save_adapter(model, tmp_path / "new" / "adapter", {"steps": 7, "loss": 0.5})
    assert path == tmp_path / "new" / "adapter"
    assert sorted(tree(path)) == ["README.md", SETTINGS, TENSORS, MANIFEST]
    assert [entry.name for entry in path.parent.iterdir()] == ["adapter"]

    manifest = json.loads((path / MANIFEST).read_text())
    hashes = tree(path)
    for name in (SETTINGS, TENSORS):
        assert manifest["files"][name] == {"bytes": (path / name).stat().st_size, "sha256": hashes[name]}
    assert manifest["format"] == 1
    assert manifest["versions"].keys() == {"lightning-lora", "lightning", "torch"}
    assert LoRAConfig.from_dict(manifest["config"]) == LoRAConfig(rank=4)
    assert manifest["summary"] == {"steps": 7, "loss": 0.5}
    assert manifest["base_fingerprint"] == fingerprint(base_digests(llama()))
    tensors = load_file(path / TENSORS)
    assert manifest["tensors"] == {name: list(tensor.shape) for name, tensor in tensors.items()}
    layers = lora_layers(model)
    assert list(manifest["layers"]) == list(layers)
    assert {layer["role"] for layer in manifest["layers"].values()} == {"attention", "mlp"}
    assert {(layer["rank"], layer["alpha"]) for layer in manifest["layers"].values()} == {(4, 32.0)}
    for name, tensor in lora_state_dict(model).items():
        assert torch.equal(tensors[f"{PREFIX}{name}.weight"], tensor)

    card = (path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    for fact in ("| adapted layers | 14 (8 attention, 6 mlp) |", "| rank | 4 |", "| steps | 7 |", "| loss | 0.5 |"):
        assert fact in card
    assert f"{sum(tensor.numel() for tensor in tensors.values()):,}" in card


def test_the_peft_settings_have_every_key_peft_writes(folder: Path, tmp_path: Path) -> None:
    ours = json.loads((folder / SETTINGS).read_text())
    peft.LoraConfig(target_modules=["q_proj"], r=4).save_pretrained(str(tmp_path / "theirs"))
    theirs = json.loads((tmp_path / "theirs" / SETTINGS).read_text())
    # Those of other methods, absent from older versions, are left out: unknown keys bring warnings there.
    optional = {key for key in theirs if key.endswith("_config")} - {"megatron_config"}
    optional |= {"arrow_config", "qalora_group_size", "use_bdlora"}
    assert theirs.keys() - ours.keys() <= optional
    assert ours.keys() <= theirs.keys()
    assert (ours["r"], ours["lora_alpha"], ours["peft_type"], ours["task_type"]) == (4, 32, "LORA", "CAUSAL_LM")
    assert ours["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert ours["inference_mode"] is True
    assert ours["init_lora_weights"] is True
    assert ours["fan_in_fan_out"] is False


def test_equal_adapters_give_equal_bytes(tmp_path: Path) -> None:
    first, second = (save_adapter(adapted(), tmp_path / name) for name in ("first", "second"))
    assert tree(first) == tree(second)


def test_tensors_keep_their_type(tmp_path: Path) -> None:
    def low() -> nn.Module:
        return llama().bfloat16()

    folder = save_adapter(adapted(low), tmp_path / "wide")
    assert {tensor.dtype for tensor in load_file(folder / TENSORS).values()} == {torch.float32}
    folder = save_adapter(adapted(low, adapter_dtype="bfloat16"), tmp_path / "low")
    assert {tensor.dtype for tensor in load_file(folder / TENSORS).values()} == {torch.bfloat16}
    model = low()
    load_adapter(model, folder)
    assert {tensor.dtype for tensor in lora_state_dict(model).values()} == {torch.bfloat16}


def test_an_adapter_is_replaced_as_a_whole(folder: Path) -> None:
    (folder / "left over.txt").write_text("of the old one")
    model = adapted(targets=["q_proj"])
    save_adapter(model, folder)
    assert sorted(tree(folder)) == ["README.md", SETTINGS, TENSORS, MANIFEST]
    assert len(read_adapter_folder(folder).ranks) == 2


def test_a_failed_save_leaves_the_old_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    before = tree(folder)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(adapted(targets=["q_proj"]), folder)
    assert tree(folder) == before
    assert [entry.name for entry in folder.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize("make", ["file", "folder"])
def test_what_is_no_adapter_is_never_overwritten(make: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if make == "file":
        out.write_text("precious")
    else:
        out.mkdir()
        (out / "thesis.txt").write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(AdapterFileError, match="out is"):
        save_adapter(adapted(), out)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_saved(value: float, tmp_path: Path) -> None:
    model = adapted()
    lora_layers(model)["model.layers.1.mlp.up_proj"].lora_B.data[0, :3] = value
    with pytest.raises(AdapterFileError, match=r"not saved: model\.layers\.1\.mlp\.up_proj\.lora_B holds 3 NaN or inf"):
        save_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_there_must_be_something_to_save(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapters"):
        save_adapter(mlp(), tmp_path / "adapter")
    with torch.device("meta"):
        empty = Net()
    inject_lora(empty, LoRAConfig(rank=4))
    with pytest.raises(ConfigError, match="on the meta device and have no values"):
        save_adapter(empty, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


# Round trips.


@pytest.mark.parametrize("build", [llama, gpt2, mlp, llama_classifier])
@pytest.mark.parametrize("settings", [{}, {"scaling": "rslora"}, {"alpha": 7.5, "dropout": 0.1, "lr_multiplier": 3.0}])
def test_an_adapter_comes_back_as_it_was(build: Callable[..., Any], settings: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(build, **settings)
    save_adapter(model, tmp_path / "adapter")
    fresh, ready = build(), build()
    inject_lora(ready, LoRAConfig.from_dict({"rank": 4, **settings}))
    for target in (fresh, ready):
        load_adapter(target, tmp_path / "adapter")
        assert portrait(target)["state"] == portrait(model)["state"]
        assert portrait(target)["classes"] == portrait(model)["classes"]
        assert portrait(target)["trains"] == portrait(model)["trains"]
        for name, layer in lora_layers(target).items():
            assert layer.lora_spec == lora_layers(model)[name].lora_spec


def test_patterns_come_back(tmp_path: Path) -> None:
    ranks, alphas = {"layers.0.mlp.up_proj": 2, "up_proj": 8}, {"down_proj": 5.5, "*.layers.1.*": 48.0}
    model = adapted(targets="mlp", rank_pattern=ranks, alpha_pattern=alphas)
    save_adapter(model, tmp_path / "adapter")
    again = llama()
    load_adapter(again, tmp_path / "adapter")
    found = {name: (layer.lora_spec.rank, layer.lora_spec.alpha) for name, layer in lora_layers(again).items()}
    assert found == {name: (layer.lora_spec.rank, layer.lora_spec.alpha) for name, layer in lora_layers(model).items()}
    assert found["model.layers.0.mlp.up_proj"] == (2, 32.0)
    assert torch.equal(logits(again), logits(model))


class WithNorm(nn.Module):
    """A trained part with buffers of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 6)
        self.head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def test_modules_trained_in_full_come_back_with_their_buffers(tmp_path: Path) -> None:
    model = WithNorm()
    inject_lora(model, LoRAConfig(rank=2, trainable=["head"]))
    wake(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
    save_adapter(model, tmp_path / "adapter")
    again = WithNorm()
    load_adapter(again, tmp_path / "adapter")
    x = torch.randn(4, 6)
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert portrait(again)["trains"] == portrait(model)["trains"]
    assert not any("base" in name for name in load_file(tmp_path / "adapter" / TENSORS) if name.endswith("body.weight"))


def test_a_part_trained_in_full_is_saved_from_a_frozen_module_too(tmp_path: Path) -> None:
    model = WithNorm()
    inject_lora(model, LoRAConfig(rank=2, trainable=["head"]))
    first = tree(save_adapter(model, tmp_path / "first"))
    model.requires_grad_(False)
    assert tree(save_adapter(model, tmp_path / "second")) == first


class Task(LightningModule):
    """A user's module around a model, with a part of its own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.net = llama(**settings)
        self.probe = nn.Linear(64, 2)


def test_names_are_those_of_the_model_inside(tmp_path: Path) -> None:
    task = Task()
    inject_lora(task, LoRAConfig(rank=4, exclude=["probe"]))
    wake(task)
    save_adapter(task, tmp_path / "adapter")
    assert set(read_adapter_folder(tmp_path / "adapter").ranks) == set(lora_layers(adapted()))
    for target in (Task(), llama()):
        load_adapter(target, tmp_path / "adapter")
        net = target.net if isinstance(target, Task) else target
        assert torch.equal(logits(net), logits(task.net))
        assert not any(p.requires_grad for n, p in target.named_parameters() if "lora_" not in n)


def test_a_part_trained_outside_the_model_is_saved_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task, again = Task(), Task()
    inject_lora(task, LoRAConfig(rank=4, trainable=["probe"]))
    wake(task)
    save_adapter(task, tmp_path / "adapter")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again.probe.weight, task.probe.weight)
    assert torch.equal(logits(again.net), logits(task.net))


def test_the_adapted_one_of_two_models_is_loaded(tmp_path: Path) -> None:
    both = nn.ModuleDict({"reference": llama(), "policy": adapted()})
    save_adapter(both, tmp_path / "adapter")
    target = nn.ModuleDict({"reference": llama(), "policy": llama()})
    inject_lora(target["policy"], LoRAConfig(rank=4))
    load_adapter(target, tmp_path / "adapter")
    assert not lora_layers(target["reference"])
    assert torch.equal(logits(target["policy"]), logits(both["policy"]))


def test_compiled_modules_save_and_load_under_plain_names(tmp_path: Path) -> None:
    model = adapted(mlp)
    compiled = torch.compile(model, backend="eager")
    assert tree(save_adapter(compiled, tmp_path / "a")) == tree(save_adapter(model, tmp_path / "b"))  # pyright: ignore
    again = torch.compile(mlp(), backend="eager")
    load_adapter(again, tmp_path / "a")  # pyright: ignore
    x = torch.randn(3, 16)
    # Compiled, the layers compute by the formula; eager, by one fused function.
    torch.testing.assert_close(again(x), model(x))


def test_saving_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    model = adapted()
    before = portrait(model)
    save_adapter(model, tmp_path / "adapter")
    assert portrait(model) == before


# The base.


def test_another_base_is_refused_unless_allowed(folder: Path) -> None:
    model = llama(seed=1)
    before, hashes = portrait(model), tree(folder)
    with pytest.raises(
        BaseMismatchError, match=r"trained on a base with fingerprint [0-9a-f]{32}, this one has"
    ) as error:
        load_adapter(model, folder)
    assert "14 of its 14 layers have other weights here" in str(error.value)
    assert "allow_other_base=True" in str(error.value)
    assert (portrait(model), tree(folder)) == (before, hashes)
    load_adapter(model, folder, allow_other_base=True)
    assert len(lora_layers(model)) == 14


def test_a_base_that_differs_elsewhere_is_refused(folder: Path) -> None:
    model = llama()
    model.model.norm.weight.data.mul_(2)
    with pytest.raises(BaseMismatchError, match="its layers agree"):
        load_adapter(model, folder)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_shallower_or_deeper_base_is_refused(layers: int, folder: Path) -> None:
    model = llama(num_hidden_layers=layers)
    before = portrait(model)
    with pytest.raises((AdapterFileError, BaseMismatchError)) as error:
        load_adapter(model, folder)
    assert ("7 of 14 adapted layers do not exist" in str(error.value)) == (layers == 1)
    assert portrait(model) == before


def test_the_base_in_low_precision_is_the_same_base(folder: Path) -> None:
    model = llama().bfloat16()
    load_adapter(model, folder)
    assert {tensor.dtype for tensor in lora_state_dict(model).values()} == {torch.float32}


def test_a_module_adapted_with_another_scale_is_refused(folder: Path) -> None:
    for settings, words in (
        ({"alpha": 16.0}, "14 of 14 layers were adapted with another scale"),
        ({"scaling": "rslora"}, "q_proj has 16, the adapter 8"),
        ({"alpha_pattern": {"up_proj": 4.0}}, "2 of 14 layers"),
    ):
        model = llama()
        inject_lora(model, LoRAConfig.from_dict({"rank": 4, **settings}))
        before = portrait(model)
        with pytest.raises(AdapterFileError) as error:
            load_adapter(model, folder)
        assert words in str(error.value)
        assert portrait(model) == before


def test_nothing_is_saved_or_loaded_while_merged(folder: Path, tmp_path: Path) -> None:
    model = adapted()
    merge_lora(model)
    before, hashes = portrait(model), tree(tmp_path)
    for operation in (lambda: save_adapter(model, folder), lambda: load_adapter(model, folder)):
        with pytest.raises(ConfigError, match=r"14 layers are merged .*Call unmerge_lora"):
            operation()
        assert (portrait(model), tree(tmp_path)) == (before, hashes)
    unmerge_lora(model)
    load_adapter(model, folder)


def test_a_merged_model_is_no_adapter_and_never_replaces_its_base(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = adapted(lambda: type(llama()).from_pretrained(tmp_path / "base"))
    hashes = tree(tmp_path)
    with pytest.raises(ConfigError, match="the base is never written to"):
        save_merged(model, tmp_path / "base")
    assert tree(tmp_path) == hashes
    save_merged(model, tmp_path / "merged")
    before, hashes = portrait(model), tree(tmp_path)
    with pytest.raises(
        AdapterFileError, match=r"merged is not an adapter: it has no adapter_config\.json, only config"
    ):
        load_adapter(model, tmp_path / "merged")
    assert (portrait(model), tree(tmp_path)) == (before, hashes)


def test_a_merged_plain_module_loads_as_a_state_dict(tmp_path: Path) -> None:
    model = adapted(mlp)
    x = torch.randn(3, 16)
    expected = model(x)
    save_merged(model, tmp_path / "merged")
    save_merged(torch.compile(model, backend="eager"), tmp_path / "again")  # pyright: ignore
    assert tree(tmp_path / "merged") == tree(tmp_path / "again")
    plain = mlp(seed=1)
    plain.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-5)


# Damage.


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
    Damaged(
        "B46 a layer missing",
        retensor(lambda t: [t.pop(name) for name in list(t) if "layers.0.mlp.up_proj" in name]),
        ("targets 1 layers that its tensors leave out", "model.layers.0.mlp.up_proj"),
    ),
    Damaged(
        "B46 an unknown tensor",
        retensor(lambda t: t.update({f"{PREFIX}model.other.weight": torch.zeros(2)})),
        ("unknown model.other.weight",),
    ),
    Damaged(
        "B46 an unknown layer",
        retensor(lambda t: renamed(t, "layers.1.", "layers.7.")),
        ("7 of 14 adapted layers do not exist in LlamaForCausalLM", "model.layers.7.mlp.down_proj", "and 2 more"),
    ),
    Damaged("B46 no prefix", retensor(lambda t: renamed(t, PREFIX, "")), ("does not start with 'base_model.model.'",)),
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
        "B46 factors of two ranks",
        retensor(lambda t: t.update({NAME: torch.zeros(3, 32)})),
        ("do not fit: A (3, 32), B (48, 4)",),
    ),
    Damaged("B46 one dimension", retensor(lambda t: t.update({NAME: torch.zeros(128)})), ("A (128,), B (48, 4)",)),
    Damaged(
        "B46 an adapted norm",
        retensor(lambda t: renamed(t, "layers.0.mlp.up_proj", "norm")),
        ("model.norm is a LlamaRMSNorm, which cannot be adapted",),
    ),
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
    Damaged("B51 no layers", rewrite(MANIFEST, lambda c: c.pop("layers")), (MANIFEST, "does not describe")),
    Damaged("B51 no fingerprint", rewrite(MANIFEST, lambda c: c.pop("base_fingerprint")), (MANIFEST, "does not desc")),
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
        "settings not JSON", lambda f: ((f / MANIFEST).unlink(), (f / SETTINGS).write_text("r: 8")), (SETTINGS, "JSON")
    ),
    Damaged(
        "settings not text", lambda f: ((f / MANIFEST).unlink(), (f / SETTINGS).write_bytes(b"\xff\xfe")), (SETTINGS,)
    ),
    Damaged(
        "settings nested without end",
        lambda f: ((f / MANIFEST).unlink(), (f / SETTINGS).write_text("[" * 200_000)),
        (SETTINGS, "not readable JSON"),
    ),
    Damaged("absent", lambda f: shutil.rmtree(f), ("adapter is absent",)),
    Damaged("B58 a file", lambda f: (shutil.rmtree(f), f.write_text("")), ("adapter is a file",)),
    Damaged("B58 a folder within", lambda f: ((f / TENSORS).unlink(), (f / TENSORS).mkdir()), (f"has no {TENSORS}",)),
    Damaged("empty folder", lambda f: (shutil.rmtree(f), f.mkdir()), ("is not an adapter", "only nothing")),
]


@pytest.mark.parametrize("row", DAMAGED, ids=lambda row: row.name)
@pytest.mark.parametrize("ready", [False, True])
def test_a_damaged_folder_changes_nothing(row: Damaged, ready: bool, folder: Path) -> None:
    model = llama()
    if ready:
        inject_lora(model, LoRAConfig(rank=4))
    row.damage(folder)
    before, hashes = portrait(model), tree(folder.parent)
    with pytest.raises(AdapterFileError) as error:
        load_adapter(model, folder, allow_other_base=True)
    assert isinstance(error.value, LoRAError)
    # What fits depends on what is there: into an adapted module names are compared, not layers found.
    if not ready:
        for word in row.words:
            assert word in str(error.value), f"{word!r} is not in: {error.value}"
    assert (portrait(model), tree(folder.parent)) == (before, hashes)
    assert not (folder.parent / "sentinel").exists()


def test_without_a_manifest_an_adapter_loads_with_a_warning(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    model = llama(seed=1)
    with without_manifest():
        load_adapter(model, folder)
    assert len(lora_layers(model)) == 14
    with_permission = llama(seed=1)
    load_adapter(with_permission, folder, allow_other_base=True)
    assert torch.equal(logits(model), logits(with_permission))


def test_a_module_adapted_otherwise_is_refused(folder: Path) -> None:
    model = adapted(targets="mlp")
    before = portrait(model)
    with pytest.raises(AdapterFileError, match=r"unknown model\.layers\.0\.self_attn\.q_proj\.lora_A"):
        load_adapter(model, folder)
    assert portrait(model) == before


def test_a_reader_sees_the_old_or_the_new_adapter(folder: Path, tmp_path: Path) -> None:
    old = {name: tensor.clone() for name, tensor in read_adapter_folder(folder).factors.items()}
    model = adapted()
    wake(model, seed=5)
    save_adapter(model, folder)
    new = read_adapter_folder(folder).factors
    assert all(torch.equal(new[name], tensor) for name, tensor in lora_state_dict(model).items())
    assert not any(torch.equal(new[name], old[name]) for name in old)
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]
