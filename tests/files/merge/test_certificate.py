"""The certificate of a merge says exactly what rounding took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.merge import write_adapter
from lightning_lora import (
    MergeReport,
)
from lightning_lora.files.merge.merge_files import CERTIFICATE_FILE, merge_files
from tests.support.adapter_files import write_merge_case
from tests.support.toys import tree


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_the_certificate_is_an_independent_float64_computation(
    stored: torch.dtype, dtype: str | None, tmp_path: Path
) -> None:
    write_merge_case("one file", tmp_path, stored)
    report = merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype)
    base = load_file(tmp_path / "base" / "model.safetensors")
    out = load_file(tmp_path / "out" / "model.safetensors")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in out.values()} == {getattr(torch, dtype) if dtype else stored}
    assert len(report.losses) == 14
    assert report.losses.keys() == report.max_errors.keys()
    for weight, loss in report.losses.items():
        prefix = f"base_model.model.{weight.removesuffix('.weight')}"
        delta = 8.0 * factors[f"{prefix}.lora_B.weight"].double() @ factors[f"{prefix}.lora_A.weight"].double()
        error = out[weight].double() - (base[weight].double() + delta)
        exactness = 1e-9 if out[weight].dtype == torch.float32 else 1e-3
        assert report.max_errors[weight] == pytest.approx(float(error.abs().max()), rel=exactness)
        assert loss == pytest.approx(float(error.norm() / delta.norm()), rel=exactness)
        # Half a unit in the last place of the type that is stored.
        unit = torch.finfo(out[weight].dtype).eps
        assert report.max_errors[weight] <= unit * float((base[weight].double() + delta).abs().max()) * 1.01
    assert all(torch.equal(out[name], base[name].to(out[name].dtype)) for name in base.keys() - report.losses.keys())
    assert f"rounding changed a weight by at most {max(report.max_errors.values()):.2e} and took" in str(report)
    assert f" {report.worst:.2%} of an update" in str(report)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_update_below_every_step_of_the_type_is_certified_as_lost(dtype: str, tmp_path: Path) -> None:
    base = {"layer.weight": torch.ones(64, 32, dtype=getattr(torch, dtype))}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    write_adapter(tmp_path / "adapter", tmp_path / "base", ["layer.weight"], rank=4)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    small = {name: factor * (1e-9 if "lora_B" in name else 1.0) for name, factor in factors.items()}
    save_file(small, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    report = merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.losses == {"layer.weight": pytest.approx(1.0, rel=1e-5)}
    delta = 2.0 * small["base_model.model.layer.lora_B.weight"] @ small["base_model.model.layer.lora_A.weight"]
    assert report.max_errors["layer.weight"] == pytest.approx(float(delta.abs().max()), rel=1e-5)


def test_the_certificate_is_written_beside_the_model(tmp_path: Path) -> None:
    write_merge_case("one file", tmp_path)
    report = merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "bfloat16")
    assert isinstance(report, MergeReport)
    assert report.adapter_sha256 == tree(tmp_path / "adapter")["adapter_model.safetensors"]
    written = json.loads((tmp_path / "out" / CERTIFICATE_FILE).read_text())
    assert written == {
        "base": str(tmp_path / "base"),
        "adapter_sha256": report.adapter_sha256,
        "dtype": "bfloat16",
        "layers": [
            {"weight": name, "max_error": report.max_errors[name], "delta_error": loss}
            for name, loss in report.losses.items()
        ],
    }
    assert len(written["layers"]) == 14
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
