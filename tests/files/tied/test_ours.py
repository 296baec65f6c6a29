"""Tied embeddings, adapted or trained in full here: memory, folder, PEFT and both merges compute the same.

Every cell of the table is trained (its logits move), then loaded into a fresh base and, as PEFT does, into a base of
other weights, reloaded in PEFT, merged on disk, written merged from memory, and written by ``save_pretrained``.

Refused, with the reason in the message: a shared weight of which one layer would be adapted
(``tied_weights="refuse"``), and an update shared with a layer that trains in full (``"both"`` beside ``trainable``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_lora import ConfigError, LoRAConfig, inject_lora, load_adapter, merge_lora, remove_lora, save_adapter
from lightning_lora.files.merge.merge_files import merge_files
from lightning_lora.files.merge.merged_model import save_merged
from tests.files.tied.families import FAMILIES, assert_equal, logits_of, model_of, train
from tests.support.tiny_models import portrait

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings=True:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:save_pretrained wrote:UserWarning"),
]

LAYERS = {"table": ("table",), "head": ("head",), "table and head": ("table", "head")}
# Ways to treat the layers of a cell: adapted or trained in full, and what tied_weights says.
WAYS = {
    "adapted apart": ("targets", "untie"),
    "adapted as one": ("targets", "both"),
    "trained as one": ("trainable", "refuse"),
    "trained apart": ("trainable", "untie"),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in list(FAMILIES)[2:]]
every_family = pytest.mark.parametrize("name", [*list(FAMILIES)[:2], *SLOW])


def settings(name: str, way: str, layers: str) -> LoRAConfig:
    family, (option, tied_weights) = FAMILIES[name], WAYS[way]
    patterns = [getattr(family, layer) for layer in LAYERS[layers]]
    asked: dict[str, Any] = {"targets": [family.layer], option: [family.layer, *patterns]}
    if option == "trainable":
        asked = {"targets": [family.layer], "trainable": patterns}
    return LoRAConfig(rank=4, tied_weights=tied_weights, **asked)


def tables(model: Any) -> list[Tensor]:
    """Embedding and head."""
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


@pytest.mark.slow
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("way", WAYS)
@every_family
def test_what_is_trained_is_what_everything_reads(name: str, way: str, layers: str, tmp_path: Path) -> None:
    base, model, config = model_of(name), model_of(name), settings(name, way, layers)
    base.save_pretrained(tmp_path / "base")
    inject_lora(model, config)
    assert torch.equal(logits_of(model), logits_of(base)), "a fresh adapter changes nothing"
    train(model)
    trained = logits_of(model)
    assert (trained - logits_of(base)).abs().max() > 1e-2 * trained.abs().max()
    save_adapter(model, tmp_path / "adapter")

    again = model_of(name)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits_of(again), trained)
    assert_equal(logits_of(peft.PeftModel.from_pretrained(model_of(name), str(tmp_path / "adapter"))), trained)

    other = model_of(name, seed=1)
    theirs = peft.PeftModel.from_pretrained(model_of(name, seed=1), str(tmp_path / "adapter"))
    load_adapter(other, tmp_path / "adapter", allow_other_base=True)
    assert_equal(logits_of(other), logits_of(theirs))

    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "on disk")
    save_merged(model, tmp_path / "from memory")
    model.save_pretrained(tmp_path / "by transformers")
    for folder in ("on disk", "from memory", "by transformers"):
        merged = type(model).from_pretrained(tmp_path / folder)
        assert_equal(logits_of(merged), trained)
        # T5 ties what is equal, whatever its config says, and looks up no tokens in the table that it names.
        if name != "t5":
            config = json.loads((tmp_path / folder / "config.json").read_text())
            assert config["tie_word_embeddings"] == way.endswith("as one")
            assert (tables(merged)[0] is tables(merged)[1]) == way.endswith("as one")
    names = {folder: load_file(tmp_path / folder / "model.safetensors").keys() for folder in ("on disk", "from memory")}
    assert names["on disk"] == names["from memory"]


@every_family
def test_an_untied_model_is_whole_without_its_adapters(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    inject_lora(model, settings(name, "adapted apart", "head"))
    train(model)
    trained = logits_of(model)
    merge_lora(model)
    remove_lora(model)
    model.save_pretrained(tmp_path)
    assert_equal(logits_of(type(model).from_pretrained(tmp_path)), trained)


@pytest.mark.parametrize("layers", LAYERS)
@every_family
def test_a_shared_weight_is_not_adapted_unless_asked(name: str, layers: str) -> None:
    model = model_of(name)
    before = portrait(model)
    patterns = [getattr(FAMILIES[name], layer) for layer in LAYERS[layers]]
    with pytest.raises(ConfigError, match=r"shares its weight with .* tied_weights='untie' gives"):
        inject_lora(model, LoRAConfig(rank=4, targets=patterns))
    assert portrait(model) == before


@pytest.mark.parametrize("trained", ["table", "head"])
@every_family
def test_an_update_is_not_shared_with_a_layer_that_trains_in_full(name: str, trained: str, tmp_path: Path) -> None:
    family, model = FAMILIES[name], model_of(name)
    adapted = {"table": family.head, "head": family.table}[trained]
    asked: dict[str, Any] = {"rank": 4, "targets": [adapted], "trainable": [getattr(family, trained)]}
    before = portrait(model)
    with pytest.raises(ConfigError, match="tied_weights='both' cannot be done here"):
        inject_lora(model, LoRAConfig(tied_weights="both", **asked))
    assert portrait(model) == before
    inject_lora(model, LoRAConfig(tied_weights="untie", **asked))
    train(model)
    save_adapter(model, tmp_path / "adapter")
    again = model_of(name)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits_of(again), logits_of(model))


@every_family
def test_the_config_that_a_model_was_built_from_is_left_alone(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    inject_lora(model, settings(name, "adapted apart", "head"))
    save_adapter(model, tmp_path / "adapter")
    fresh = model_of(name)
    config, kind = fresh.config, type(fresh)
    asked = settings(name, "adapted apart", "table and head")
    for adapt in (lambda module: load_adapter(module, tmp_path / "adapter"), lambda module: inject_lora(module, asked)):
        before = config.to_dict()
        mine = kind(config)
        mine.load_state_dict(model_of(name).state_dict())
        adapt(mine)
        assert mine.config.tie_word_embeddings is False
        assert config.to_dict() == before
        second = kind(config)
        assert tables(second)[0] is tables(second)[1]
