"""An adapter loads only into the base it was trained on, adapted in the same way or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import (
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    LoRAConfig,
    inject_lora,
    load_adapter,
    lora_layers,
    lora_state_dict,
    merge_lora,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.files.adapter.manifest import MANIFEST_FILE
from tests.support.adapter_files import adapted
from tests.support.tiny_models import llama, logits, portrait
from tests.support.toys import tree


def without_manifest() -> Any:
    return pytest.warns(UserWarning, match=r"has no lightning_lora\.json")


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


def test_without_a_manifest_an_adapter_loads_with_a_warning(folder: Path) -> None:
    (folder / MANIFEST_FILE).unlink()
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
