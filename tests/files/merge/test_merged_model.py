"""A merged model is written for others to load, and is never taken for an adapter or its base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_lora import (
    AdapterFileError,
    ConfigError,
    load_adapter,
)
from lightning_lora.files.merge.merged_model import save_merged
from tests.support.adapter_files import adapted
from tests.support.tiny_models import llama, mlp, portrait
from tests.support.toys import tree


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
