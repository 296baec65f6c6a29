"""A vocabulary resized before injection travels with the adapter; one resized after it is refused.

Refused, with the reason: a base that was not resized (load and merge name the size), a base that shares no row with the
stored one, and every use of a model that was resized after its embedding or head had been adapted.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from lightning_lora import (
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    LoRAConfig,
    disable_lora,
    inject_lora,
    load_adapter,
    lora_layers,
    lora_state_dict,
    merge_lora,
    remove_lora,
    save_adapter,
)
from lightning_lora.files.merge.merge_files import merge_files
from lightning_lora.files.merge.merged_model import save_merged
from tests.files.tied.families import FAMILIES, Family, assert_equal, logits_of, model_of, train
from tests.files.tied.test_ours import SLOW, tables
from tests.oracle.peft_models import peft_warnings, without_manifest
from tests.support.tiny_models import TOKENS, VOCAB, llama, portrait

pytestmark = [
    pytest.mark.slow,
    *peft_warnings,
    pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings=True:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:save_pretrained wrote:UserWarning"),
]

LARGER = VOCAB + 8
NEW_TOKENS = TOKENS % 8 + VOCAB
every_family = pytest.mark.parametrize("name", [*list(FAMILIES)[:2], *SLOW])


def resized(base: Any, seed: int) -> Any:
    """A copy of ``base`` with new rows, which are other ones for each seed."""
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    model.resize_token_embeddings(LARGER, mean_resizing=False)
    assert logits_of(model, NEW_TOKENS).isfinite().all()
    return model


def base_on_disk(name: str, folder: Path) -> Any:
    """A base that was loaded from a folder, as PEFT and we look there for its size."""
    model = model_of(name)
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


def family_of(name: str) -> Family:
    """The family after resizing: encoder and decoder of BART and T5 then look tokens up in the shared table itself."""
    return replace(FAMILIES[name], table="shared") if name in ("bart", "t5") else FAMILIES[name]


def both_logits(model: Any) -> torch.Tensor:
    return torch.cat([logits_of(model, TOKENS), logits_of(model, NEW_TOKENS)])


THEIRS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "layers": lambda family: {"target_modules": [family.layer]},
    "table": lambda family: {"target_modules": [family.layer, family.table]},
    "table and head": lambda family: {"target_modules": [family.layer, family.table, family.head]},
    "trained table": lambda family: {"target_modules": [family.layer], "modules_to_save": [family.table]},
}


@pytest.mark.parametrize("asked", THEIRS)
@every_family
def test_the_rows_that_peft_stores_are_restored(name: str, asked: str, tmp_path: Path) -> None:
    base = base_on_disk(name, tmp_path / "base")
    config = peft.LoraConfig(r=4, **THEIRS[asked](family_of(name)))
    theirs = peft.get_peft_model(resized(base, seed=1), config)
    train(theirs)
    # PEFT knows some embeddings by name only, and only if they are adapted.
    theirs.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    elsewhere = resized(base, seed=2)
    expected = both_logits(peft.PeftModel.from_pretrained(copy.deepcopy(elsewhere), str(tmp_path / "adapter")))
    model = copy.deepcopy(elsewhere)
    elsewhere.save_pretrained(tmp_path / "resized")
    if name in ("bart", "t5") and asked != "layers":
        before = portrait(model)
        with pytest.raises(AdapterFileError, match=r"changes .*shared but not .*embed_tokens.* one layer here"):
            load_adapter(model, tmp_path / "adapter")
        assert portrait(model) == before
        model = type(base).from_pretrained(tmp_path / "resized")
        elsewhere = type(base).from_pretrained(tmp_path / "resized")
        expected = both_logits(peft.PeftModel.from_pretrained(elsewhere, str(tmp_path / "adapter")))
    with without_manifest():
        load_adapter(model, tmp_path / "adapter")
    assert_equal(both_logits(model), expected)
    merge_files(tmp_path / "resized", tmp_path / "adapter", tmp_path / "merged")
    assert_equal(both_logits(type(base).from_pretrained(tmp_path / "merged")), expected)


OURS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "layers": lambda family: {"targets": [family.layer]},
    "table apart": lambda family: {"targets": [family.layer, family.table], "tied_weights": "untie"},
    "as one": lambda family: {"targets": [family.layer, family.head], "tied_weights": "both"},
    "trained head": lambda family: {"targets": [family.layer], "trainable": [family.head], "tied_weights": "untie"},
}


@pytest.mark.parametrize("asked", OURS)
@every_family
def test_the_rows_that_were_added_before_injection_travel_with_the_adapter(
    name: str, asked: str, tmp_path: Path
) -> None:
    base = base_on_disk(name, tmp_path / "base")
    model = resized(base, seed=1)
    inject_lora(model, LoRAConfig(rank=4, **OURS[asked](family_of(name))))
    train(model)
    trained = both_logits(model)
    save_adapter(model, tmp_path / "adapter")
    elsewhere = resized(base, seed=2)
    again = copy.deepcopy(elsewhere)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(both_logits(again), trained)
    elsewhere.save_pretrained(tmp_path / "resized")
    # Where several places hold one layer, PEFT adapts one place only; a model that was loaded holds one layer in each.
    loaded = type(base).from_pretrained(tmp_path / "resized")
    assert_equal(both_logits(peft.PeftModel.from_pretrained(loaded, str(tmp_path / "adapter"))), trained)
    merge_files(tmp_path / "resized", tmp_path / "adapter", tmp_path / "on disk")
    save_merged(model, tmp_path / "from memory")
    model.save_pretrained(tmp_path / "by transformers")
    for folder in ("on disk", "from memory", "by transformers"):
        assert_equal(both_logits(type(base).from_pretrained(tmp_path / folder)), trained)


def test_a_base_that_was_not_resized_is_told_the_size(tmp_path: Path) -> None:
    base = base_on_disk("llama", tmp_path / "base")
    model = resized(base, seed=1)
    inject_lora(model, LoRAConfig(rank=4, targets=["q_proj"]))
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(BaseMismatchError, match=r"\(72, 32\), which is \(64, 32\) here: .*embeddings\(72\) first"):
        load_adapter(copy.deepcopy(base), tmp_path / "adapter", allow_other_base=True)
    with pytest.raises(AdapterFileError, match=r"resize_token_embeddings\(72\), save it, and merge into that"):
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    other = resized(model_of("llama", seed=1), seed=2)
    with pytest.raises(BaseMismatchError, match="no row in common"):
        load_adapter(copy.deepcopy(other), tmp_path / "adapter")
    load_adapter(other, tmp_path / "adapter", allow_other_base=True)
    assert torch.equal(tables(other)[0], tables(model)[0])


def test_a_vocabulary_of_the_size_of_the_base_is_not_stored(tmp_path: Path) -> None:
    model = base_on_disk("llama", tmp_path / "base")
    inject_lora(model, LoRAConfig(rank=4, targets=["embed_tokens"], tied_weights="untie"))
    save_adapter(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in stored)


def untied(**settings: Any) -> Any:
    model: Any = llama(tie_word_embeddings=False)
    inject_lora(model, LoRAConfig(rank=4, **settings))
    return model


def tied(name: str, *layers: str, way: str) -> Any:
    model = model_of(name)
    patterns = [getattr(FAMILIES[name], layer) for layer in layers]
    inject_lora(model, LoRAConfig(rank=4, targets=patterns, tied_weights=way))
    return model


ADAPTED: dict[str, Callable[[], Any]] = {
    "head": lambda: untied(targets=["lm_head"]),
    "head and layers": lambda: untied(adapt_head=True),
    "table": lambda: untied(adapt_embeddings=True),
    "table and head": lambda: untied(adapt_embeddings=True, adapt_head=True),
    **{f"{name}, as one": lambda name=name: tied(name, "head", way="both") for name in FAMILIES},
    **{f"{name}, head": lambda name=name: tied(name, "head", way="untie") for name in FAMILIES},
    **{f"{name}, table": lambda name=name: tied(name, "table", way="untie") for name in FAMILIES},
}
USES: dict[str, Callable[[Any, Path], object]] = {
    "forward": lambda model, path: logits_of(model),
    "save the adapter": lambda model, path: save_adapter(model, path),
    "save merged": lambda model, path: save_merged(model, path),
    "save_pretrained": lambda model, path: model.save_pretrained(path),
    "merge": lambda model, path: merge_lora(model),
    "read the adapter": lambda model, path: lora_state_dict(model),
    "disable": lambda model, path: disable_lora(model).__enter__(),
    "copied": lambda model, path: logits_of(copy.deepcopy(model)),
    "unpickled": lambda model, path: logits_of(pickle.loads(pickle.dumps(model))),
}


@pytest.mark.parametrize("size", [VOCAB + 8, VOCAB - 8])
@pytest.mark.parametrize("adapted", ADAPTED)
def test_a_vocabulary_resized_after_injection_is_refused_at_once(adapted: str, size: int, tmp_path: Path) -> None:
    model = ADAPTED[adapted]()
    logits_of(model)
    model.resize_token_embeddings(size, mean_resizing=False)
    for name, use in USES.items():
        with pytest.raises(ConfigError, match=rf"resized from 64 to {size} tokens after .*Resize first"):
            use(model, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    remove_lora(model)
    assert not lora_layers(model)
    assert logits_of(model, TOKENS % (VOCAB - 8)).isfinite().all()


def test_layers_that_a_larger_vocabulary_does_not_touch_go_on() -> None:
    model = untied(targets=["q_proj"])
    train(model)
    before = logits_of(model)
    model.resize_token_embeddings(LARGER, mean_resizing=False)
    torch.testing.assert_close(logits_of(model)[..., :VOCAB], before)
    with pytest.raises(ConfigError, match="adapted already"):
        inject_lora(model, LoRAConfig(rank=4))
