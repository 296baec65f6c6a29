"""PEFT as oracle for magnitudes (DoRA): equal outputs, gradients, runs, files and merged models, both ways."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    AdapterFileError,
    LoRAConfig,
    inject_lora,
    load_adapter,
    lora_layers,
    lora_state_dict,
    merge_lora,
    save_adapter,
)
from lightning_lora.files.adapter.folder import read_adapter_folder
from lightning_lora.files.adapter.one_scale import check_llama_cpp, vllm_flags
from lightning_lora.files.adapter.peft_format import PREFIX, TENSOR_FILE
from lightning_lora.files.merge.merge_files import merge_files
from lightning_lora.files.merge.merged_model import save_merged
from tests.oracle.peft_models import peft_warnings, their_factors, without_manifest
from tests.support.tiny_models import TOKENS, gpt2, llama, logits

pytestmark = peft_warnings

TARGETS = ["table", "conv", "narrow", "up", "down"]
ROWS = torch.arange(24).reshape(3, 8) % 20


class Net(nn.Module):
    """One layer of every kind that has a magnitude in PEFT."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 12, padding_idx=0)
        self.conv, self.narrow = nn.Conv2d(1, 3, 3, padding=1), nn.Conv1d(12, 6, 3)
        self.up, self.down = nn.Linear(6, 10), Conv1D(4, 10)

    def forward(self, rows: Tensor) -> Tensor:
        images = torch.tanh(self.conv(self.table(rows)[:, None])).mean(1)
        return self.down(torch.tanh(self.up(self.narrow(images.mT).mT)))


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().to(dtype)


def wrapped(model: Any, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"r": 3, "lora_alpha": 7, "target_modules": TARGETS, "use_dora": True}
    return peft.get_peft_model(model, peft.LoraConfig(**defaults | settings))


def adapted(model: nn.Module, **settings: Any) -> nn.Module:
    config = {"rank": 3, "alpha": 7.0, "targets": TARGETS, "dora": True} | settings
    inject_lora(model, LoRAConfig.from_dict(config))
    return model


def wake(module: nn.Module) -> None:
    """Give the factors random values, and move every magnitude a little."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                noise = 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                parameter.mul_(1 + noise) if "magnitude" in name else parameter.copy_(noise)


def magnitudes(theirs: nn.Module) -> dict[str, nn.Parameter]:
    """Our name to PEFT's parameter, for every magnitude."""
    ending = ".lora_magnitude_vector.default.weight"
    return {
        f"{name.removeprefix(PREFIX).removesuffix(ending)}.lora_magnitude": parameter
        for name, parameter in theirs.named_parameters()
        if name.endswith(ending)
    }


def both(dtype: torch.dtype, dropout: float = 0.0) -> tuple[nn.Module, Any, dict[str, nn.Parameter]]:
    """Our adapted net and PEFT's with equal tensors, and PEFT's parameters by our names."""
    ours, theirs = adapted(net(dtype), dropout=dropout), wrapped(net(dtype), lora_dropout=dropout)
    wake(ours)
    matching = their_factors(theirs) | magnitudes(theirs)
    state = lora_state_dict(ours)
    assert matching.keys() == state.keys()
    for name, tensor in state.items():
        matching[name].data.copy_(tensor.reshape(matching[name].shape))
    return ours, theirs, matching


def test_a_fresh_magnitude_is_that_of_peft() -> None:
    found = lora_state_dict(adapted(net()))
    for name, parameter in magnitudes(wrapped(net())).items():
        torch.testing.assert_close(found[name], parameter.detach().flatten(), rtol=1e-14, atol=0)


@pytest.mark.filterwarnings("ignore:.*dropout in table:UserWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_steps_of_adamw_are_those_of_peft(dtype: torch.dtype, tolerance: float, dropout: float) -> None:
    ours, theirs, matching = both(dtype, dropout)
    # In float32 a larger eps, as gradients near zero would be divided by rounding errors.
    eps = 1e-8 if dtype is torch.float64 else 1e-4
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, eps=eps) for model in (ours, theirs)
    ]
    for step in range(5):
        outputs = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad()
            outputs.append(model(ROWS))
            outputs[-1].square().mean().backward()
        torch.testing.assert_close(outputs[0], outputs[1], rtol=tolerance, atol=tolerance)
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                expected = torch.as_tensor(matching[name].grad).reshape(parameter.shape)
                assert bool(expected.any()), name
                size = float(expected.abs().max())
                torch.testing.assert_close(parameter.grad, expected, rtol=tolerance, atol=tolerance * size)
        for optimizer in optimizers:
            optimizer.step()
    for name, tensor in lora_state_dict(ours).items():
        expected = matching[name].detach().reshape(tensor.shape)
        torch.testing.assert_close(tensor, expected, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but the target module is:UserWarning")
def test_our_folder_computes_the_same_in_peft_and_pefts_here(tmp_path: Path) -> None:
    ours, theirs, _ = both(torch.float64)
    save_adapter(ours, tmp_path / "ours")
    loaded: Any = peft.PeftModel.from_pretrained(net(), str(tmp_path / "ours"))  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(loaded(ROWS), ours(ROWS), rtol=1e-12, atol=1e-12)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = net()
    with without_manifest():
        load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(again(ROWS), theirs(ROWS), rtol=1e-12, atol=1e-12)
    assert all(layer.lora_spec.config.dora for layer in lora_layers(again).values())
    # Saved again, the tensors are those that PEFT wrote.
    save_adapter(again, tmp_path / "again")
    written, original = (load_file(tmp_path / folder / TENSOR_FILE) for folder in ("again", "theirs"))
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in original.items())
    merged = [loaded.merge_and_unload(), ours]
    merge_lora(ours)
    torch.testing.assert_close(merged[0](ROWS), merged[1](ROWS), rtol=1e-10, atol=1e-10)
    # Into layers that are adapted already, and from a live model's state dict.
    into = adapted(net())
    state = {k: v.contiguous() for k, v in theirs.state_dict().items() if "lora_" in k}
    save_file(state, tmp_path / "theirs" / TENSOR_FILE)
    with without_manifest():
        load_adapter(into, tmp_path / "theirs")
    assert torch.equal(into(ROWS), again(ROWS))


@pytest.mark.filterwarnings("ignore:.*no weight to adapt is shared:UserWarning")
@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_a_merge_on_disk_is_the_merge_in_memory(build: Callable[[], Any], shard_size: str, tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path / "base", max_shard_size=shard_size)
    adapted(model, targets="all", adapt_embeddings=True, tied_weights="untie")
    wake(model)
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter")
    report = merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "disk")
    assert report.worst < 1e-3
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "disk").eval())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    save_merged(model, tmp_path / "memory")
    again = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "memory").eval())
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(build()), expected, atol=1e-2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    module = adapted(net(torch.float32))
    wake(module)
    return save_adapter(module, tmp_path / "folder")


def test_servers_that_know_no_magnitudes_are_refused(folder: Path) -> None:
    read = read_adapter_folder(folder)
    with pytest.raises(AdapterFileError, match=r"vLLM loads no adapters with magnitudes.*Export it merged"):
        vllm_flags(read)
    with pytest.raises(AdapterFileError, match=r"knows no magnitudes \(DoRA\).*--format merged"):
        check_llama_cpp(read, None)


def test_the_card_names_the_method_and_counts_the_parameters(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    count = sum(tensor.numel() for tensor in load_file(folder / TENSOR_FILE).values())
    assert "| method | DoRA" in card
    assert f"| adapter parameters | {count:,} |" in card


def changed(folder: Path, config: dict[str, Any], change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy without manifest, with another config and other tensors."""
    out = folder.parent / "changed"
    shutil.copytree(folder, out)
    (out / "lightning_lora.json").unlink()
    path = out / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    tensors = load_file(out / TENSOR_FILE)
    change(tensors)
    save_file(tensors, out / TENSOR_FILE)
    return out


NAME = f"{PREFIX}up.lora_magnitude_vector"

BROKEN: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], Any], str]] = {
    "a magnitude is missing": ({}, lambda t: t.pop(NAME), "no lora_magnitude_vector of 1 layers: up"),
    "use_dora is off": ({"use_dora": False}, lambda t: None, "magnitudes of 5 layers .*set use_dora to true"),
    "another size": ({}, lambda t: t.update({NAME: torch.ones(3)}), r"magnitude of 'up' is \(3,\).*10 output"),
    "not finite": ({}, lambda t: t[NAME].fill_(float("nan")), "lora_magnitude holds 10 NaN"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_with_wrong_magnitudes_is_refused_and_nothing_changes(case: str, folder: Path) -> None:
    config, change, words = BROKEN[case]
    module = net(torch.float32)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(AdapterFileError, match=words):
        load_adapter(module, changed(folder, config, change))
    assert module.state_dict().keys() == before.keys()


def test_an_adapter_with_magnitudes_does_not_load_into_one_without_or_the_reverse(folder: Path) -> None:
    plain = adapted(net(torch.float32), dora=False)
    with pytest.raises(AdapterFileError, match=r"5 of 10 .*unknown table\.lora_magnitude"):
        load_adapter(plain, folder)
    other = save_adapter(plain, folder.parent / "plain")
    with pytest.raises(AdapterFileError, match=r"missing table\.lora_magnitude"):
        load_adapter(adapted(net(torch.float32)), other)


def test_manifest_and_config_must_agree(folder: Path) -> None:
    manifest = json.loads((folder / "lightning_lora.json").read_text())
    manifest["config"]["dora"] = False
    (folder / "lightning_lora.json").write_text(json.dumps(manifest))
    with pytest.raises(AdapterFileError, match="use_dora is True, dora False"):
        load_adapter(net(torch.float32), folder)


def test_magnitudes_on_layers_without_a_kind_for_them_are_refused(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4))
    adapted(base, targets=["0"])
    save_adapter(base, tmp_path / "linear")
    module = nn.Sequential(nn.ConvTranspose1d(4, 4, 1))
    with pytest.raises(AdapterFileError, match=r"cannot be adapted with a magnitude \(DoRA\)"):
        load_adapter(module, tmp_path / "linear", allow_other_base=True)


def test_tokens_go_through_a_tied_model_untied(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    adapted(model, targets=["embed_tokens", "lm_head"], tied_weights="untie")
    wake(model)
    save_adapter(model, tmp_path)
    again = llama(tie_word_embeddings=True)
    load_adapter(again, tmp_path)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
