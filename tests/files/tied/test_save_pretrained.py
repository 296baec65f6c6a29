"""``save_pretrained`` of an adapted Hugging Face model writes what the model computes, and says so."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaModel

from lightning_lora import ConfigError, LoRAConfig, inject_lora, load_adapter, merge_lora, remove_lora, save_adapter
from tests.files.tied.families import FAMILIES, assert_equal, logits_of, model_of, train
from tests.support.tiny_models import state_bytes

MERGED = r"save_pretrained wrote \w+ with the updates of \d+ layers merged in. save_adapter\(model, path\)"


def adapted(name: str = "llama", **settings: Any) -> Any:
    model = model_of(name)
    inject_lora(model, LoRAConfig(rank=4, **settings))
    train(model)
    return model


def reloaded(model: Any, path: Path) -> torch.Tensor:
    return logits_of(type(model).from_pretrained(path))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_written_model_computes_what_the_adapted_one_does(name: str, tmp_path: Path) -> None:
    model = adapted(name, targets=[FAMILIES[name].layer])
    before = state_bytes(model)
    with pytest.warns(UserWarning, match=MERGED):
        model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert state_bytes(model) == before
    assert_equal(reloaded(model, tmp_path / "model"), logits_of(model))
    # What a trainer gathers and gives is the same.
    with pytest.warns(UserWarning, match=MERGED):
        model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    assert_equal(reloaded(model, tmp_path / "given"), logits_of(model))


def test_a_model_that_was_merged_is_written_once_merged(tmp_path: Path) -> None:
    model = adapted()
    expected = logits_of(model)
    merge_lora(model)
    with pytest.warns(UserWarning, match=MERGED):
        model.save_pretrained(tmp_path)
    assert_equal(reloaded(model, tmp_path), expected)


def test_an_inner_model_is_written_merged(tmp_path: Path) -> None:
    model = adapted()
    with pytest.warns(UserWarning, match=MERGED):
        model.model.save_pretrained(tmp_path)
    inner: Any = LlamaModel.from_pretrained(tmp_path)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert_equal(inner(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


def test_a_model_inside_a_module_and_one_that_loaded_an_adapter_are_written_merged(tmp_path: Path) -> None:
    model = adapted()
    save_adapter(model, tmp_path / "adapter")
    holder = nn.ModuleDict({"net": model_of("llama")})
    load_adapter(holder, tmp_path / "adapter")
    net: Any = holder["net"]
    with pytest.warns(UserWarning, match=MERGED):
        net.save_pretrained(tmp_path / "model")
    assert_equal(reloaded(net, tmp_path / "model"), logits_of(model))


def test_copies_and_pickles_write_their_own_weights(tmp_path: Path) -> None:
    model = adapted()
    for number, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        train(twin, seed=number + 5)
        with pytest.warns(UserWarning, match=MERGED):
            twin.save_pretrained(tmp_path / str(number))
        assert_equal(reloaded(twin, tmp_path / str(number)), logits_of(twin))
        assert not torch.equal(logits_of(twin), logits_of(model))


def test_a_state_dict_without_adapters_is_written_as_given(tmp_path: Path) -> None:
    model = adapted()
    base = {name: value for name, value in model.state_dict().items() if "lora_" not in name}
    model.save_pretrained(tmp_path, state_dict=base)
    assert_equal(reloaded(model, tmp_path), logits_of(model_of("llama")))


def test_a_state_dict_with_other_adapters_is_refused(tmp_path: Path) -> None:
    model = adapted()
    other = {name: value + 1 if "lora_" in name else value for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"other adapters than the model \(model\.layers\.0"):
        model.save_pretrained(tmp_path / "model", state_dict=other)
    assert not (tmp_path / "model").exists()


def test_a_model_without_adapters_writes_itself_as_before(tmp_path: Path) -> None:
    model = adapted()
    remove_lora(model)
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path)
    assert_equal(reloaded(model, tmp_path), logits_of(model_of("llama")))
