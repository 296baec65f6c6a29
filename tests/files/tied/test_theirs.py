"""PEFT's adapters of tied embeddings: LoRA on them or ``modules_to_save``, with and without ``ensure_weight_tying``.

The oracle is PEFT's live model, as PEFT's own reload is wrong in some cells: for GPT-2, T5 and BART it loses the update
of a head with ``ensure_weight_tying``. PEFT cannot run ``modules_to_save`` with ``ensure_weight_tying`` in BART and T5
(it builds their tied tables as linear layers), and ignores it for GPT-2's ``wte`` alone. No cell is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from lightning_lora import LoRAConfig, inject_lora, load_adapter, lora_layers, save_adapter
from lightning_lora.files.merge.merge_files import merge_files
from tests.files.tied.families import FAMILIES, assert_equal, logits_of, model_of, train
from tests.files.tied.test_ours import LAYERS, every_family, tables
from tests.oracle.peft_models import peft_warnings, without_manifest

pytestmark = [
    *peft_warnings,
    pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings=True:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have requested .ensure_weight_tying.:UserWarning"),
]


def wrapped(model: Any, option: str, ensure_weight_tying: bool, layers: str, name: str) -> Any:
    """``model`` in PEFT, trained."""
    family = FAMILIES[name]
    patterns = [getattr(family, layer) for layer in LAYERS[layers]]
    asked: dict[str, Any] = {"target_modules": [family.layer], option: patterns}
    if option == "target_modules":
        asked = {option: [family.layer, *patterns]}
    config = peft.LoraConfig(r=4, lora_alpha=8, ensure_weight_tying=ensure_weight_tying, **asked)
    theirs = peft.get_peft_model(model, config)
    train(theirs)
    return theirs


@pytest.mark.slow
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("ensure_weight_tying", [False, True])
@pytest.mark.parametrize("option", ["target_modules", "modules_to_save"])
@every_family
def test_what_peft_trained_is_what_everything_reads(
    name: str, option: str, ensure_weight_tying: bool, layers: str, tmp_path: Path
) -> None:
    if ensure_weight_tying and option == "modules_to_save" and name in ("bart", "t5"):
        pytest.skip("PEFT builds tied embeddings of encoder and decoder as linear layers, and fails in forward")
    base = model_of(name)
    base.save_pretrained(tmp_path / "base")
    theirs = wrapped(model_of(name), option, ensure_weight_tying, layers, name)
    trained = logits_of(theirs)
    assert (trained - logits_of(base)).abs().max() > 1e-2 * trained.abs().max()
    theirs.save_pretrained(str(tmp_path / "adapter"))

    model = model_of(name)
    config = model.config
    before = config.to_dict()
    with without_manifest():
        load_adapter(model, tmp_path / "adapter")
    assert_equal(logits_of(model), trained)
    assert config.to_dict() == before
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert_equal(logits_of(type(base).from_pretrained(tmp_path / "merged")), trained)

    # Written again here, read by PEFT.
    save_adapter(model, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(model_of(name), str(tmp_path / "again"))
    assert_equal(logits_of(again), trained)


@pytest.mark.parametrize("option", ["target_modules", "modules_to_save"])
def test_a_base_of_other_weights_gives_what_peft_gives(option: str, tmp_path: Path) -> None:
    theirs = wrapped(model_of("llama"), option, False, "table and head", "llama")
    theirs.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    other = model_of("llama", seed=1)
    with without_manifest():
        load_adapter(other, tmp_path / "adapter")
    expected = peft.PeftModel.from_pretrained(model_of("llama", seed=1), str(tmp_path / "adapter"))
    assert_equal(logits_of(other), logits_of(expected))


def test_what_trained_as_one_in_peft_stays_one(tmp_path: Path) -> None:
    theirs = wrapped(model_of("llama"), "modules_to_save", True, "table", "llama")
    theirs.save_pretrained(str(tmp_path / "adapter"))
    model = model_of("llama")
    with without_manifest():
        load_adapter(model, tmp_path / "adapter")
    assert tables(model)[0] is tables(model)[1]
    assert tables(model)[0].requires_grad


def test_a_module_trained_in_full_loads_into_an_adapted_tied_model(tmp_path: Path) -> None:
    theirs = wrapped(model_of("llama"), "modules_to_save", False, "head", "llama")
    theirs.save_pretrained(str(tmp_path / "adapter"))
    model = model_of("llama")
    for _ in range(2):
        with without_manifest():
            load_adapter(model, tmp_path / "adapter")
        assert_equal(logits_of(model), logits_of(theirs))
    plain = model_of("llama")
    wanted = {layer: found.lora_spec.config for layer, found in lora_layers(model).items()}
    first = next(iter(wanted.values()))
    inject_lora(plain, LoRAConfig(rank=first.rank, alpha=first.alpha, targets=list(wanted)))
    with without_manifest():
        load_adapter(plain, tmp_path / "adapter")
    assert_equal(logits_of(plain), logits_of(theirs))
    assert not torch.equal(*tables(plain))
