"""Tasks on a base loaded in 4 or 8 bits."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import BitsandbytesPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lightning_lora import ConfigError, LoRAConfig, lora_layers
from lightning_lora.callbacks import LoRAGuard, MergeOnFitEnd
from lightning_lora.lora.layers import LoRAQuantisedLinear
from lightning_lora.sharding import FSDP2Strategy
from lightning_lora.tasks import CausalLM, SequenceClassifier
from lightning_lora.tasks.quantised_loading import check_strategy
from tests.support import toys
from tests.support.quantised_models import bnb, difference

pytestmark = toys.expected_warnings

LORA = LoRAConfig(rank=4)
LAYER = {"nf4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}


def loader(labels: bool = False) -> Any:
    rows: list[dict[str, Any]] = toys.token_rows()
    if labels:
        rows = [row | {"labels": torch.tensor(index % 3)} for index, row in enumerate(rows)]
    return DataLoader(rows, batch_size=4)  # pyright: ignore[reportArgumentType]


def make(folder: Path, **options: Any) -> CausalLM:
    return CausalLM(str(folder), **({"learning_rate": 2e-3, "lora": LORA, "quantization": "nf4"} | options))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("quantization", LAYER)
def test_the_base_is_quantised_but_for_its_head_and_trains(
    quantization: str, precision: Any, llama_folder: Path, tmp_path: Path
) -> None:
    module = make(llama_folder, quantization=quantization)
    trainer = toys.trainer(tmp_path, max_epochs=10, precision=precision, callbacks=[LoRAGuard()])
    before = trainer.validate(module, loader(), verbose=False)[0]["val_loss"]
    trainer.fit(module, loader(), loader())
    assert trainer.global_step == 20
    assert trainer.callback_metrics["val_loss"] < before
    layers = lora_layers(module)
    assert len(layers) == 14
    assert all(isinstance(layer, LoRAQuantisedLinear) for layer in layers.values())
    assert all(isinstance(layer, LAYER[quantization]) for layer in layers.values())
    assert type(module.get_submodule("model.lm_head")) is nn.Linear
    assert all(layer.lora_A.dtype == layer.lora_B.dtype == torch.float32 for layer in layers.values())


@pytest.mark.parametrize("quantization", LAYER)
def test_a_classifier_trains_a_plain_head_on_a_quantised_base(
    quantization: str, llama_folder: Path, tmp_path: Path
) -> None:
    module = SequenceClassifier(str(llama_folder), 3, learning_rate=2e-3, lora=LORA, quantization=quantization)
    toys.trainer(tmp_path, callbacks=[LoRAGuard()]).fit(module, loader(labels=True))
    head = module.get_submodule("model.score")
    assert type(head) is nn.Linear
    assert all(parameter.requires_grad for parameter in head.parameters())
    assert all(isinstance(layer, LAYER[quantization]) for layer in lora_layers(module).values())


def test_what_is_trained_in_full_is_not_quantised(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder, lora=LoRAConfig(rank=4, trainable=["layers.1.mlp.up_proj"]))
    toys.trainer(tmp_path, callbacks=[LoRAGuard()]).fit(module, loader())
    trained = module.get_submodule("model.model.layers.1.mlp.up_proj")
    assert type(trained) is nn.Linear
    assert trained.weight.requires_grad


def test_the_run_merges_at_its_end_and_its_checkpoint_resumes(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder)
    trainer = toys.trainer(tmp_path, callbacks=[MergeOnFitEnd(str(tmp_path / "merged"))])
    with pytest.warns(UserWarning, match="the merged model is not quantised: 14 quantised layers"):
        trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    batch = next(iter(loader()))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").train()
    with torch.no_grad():
        expected = module.train()(batch["input_ids"])
        assert difference(merged(batch["input_ids"]).logits, expected) < 1e-5
        loaded = CausalLM.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
        assert torch.equal(loaded.train()(batch["input_ids"]), expected)
    resumed = make(llama_folder)
    again = toys.trainer(tmp_path, max_epochs=2)
    again.fit(resumed, loader(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert again.global_step == 4


def test_a_model_that_is_stored_quantised_is_adapted_as_it_is(llama_folder: Path, tmp_path: Path) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=config).save_pretrained(tmp_path / "nf4")
    module = make(tmp_path / "nf4", quantization=None)
    toys.trainer(tmp_path, callbacks=[LoRAGuard()]).fit(module, loader())
    assert all(isinstance(layer, bnb.nn.Linear4bit) for layer in lora_layers(module).values())
    with pytest.raises(ConfigError, match="the model is stored quantised: leave it null"):
        make(tmp_path / "nf4")
    with pytest.raises(ConfigError, match="cannot be trained in full"):
        make(tmp_path / "nf4", quantization=None, lora=None)


REFUSED = {
    "unknown": ({"quantization": "nf"}, "quantization must be one of nf4, int8 or null, got 'nf'; did you mean 'nf4'?"),
    "full": ({"lora": None}, "a quantised base (quantization=nf4) cannot be trained in full: give lora settings"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_work_are_refused_before_anything_is_loaded(name: str, llama_folder: Path) -> None:
    options, message = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        make(llama_folder, **options)
    assert message in str(error.value)


@pytest.mark.parametrize("missing", ["bitsandbytes", "accelerate"])
def test_a_missing_library_is_named_with_the_way_to_install_it(
    missing: str, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "lightning_lora.tasks.quantised_loading.find_spec", lambda name: None if name == missing else find(name)
    )
    with pytest.raises(ConfigError, match=rf"needs {missing}: pip install lightning-lora\[quant\]"):
        make(llama_folder)
    make(llama_folder, quantization=None)


SHARDING: list[Any] = [FSDPStrategy, ModelParallelStrategy, FSDP2Strategy]
if importlib.util.find_spec("deepspeed"):
    SHARDING.append(DeepSpeedStrategy)


@pytest.mark.parametrize("strategy", SHARDING)
def test_strategies_that_shard_are_refused(strategy: type[Any], tmp_path: Path) -> None:
    trainer = toys.trainer(tmp_path)
    check_strategy(trainer)
    trainer._accelerator_connector.strategy = strategy()
    with pytest.raises(ConfigError, match=f"{strategy.__name__} cannot shard a quantised base"):
        check_strategy(trainer)


def test_lightnings_plugin_is_refused_where_transformers_loads_the_weights(llama_folder: Path, tmp_path: Path) -> None:
    trainer = toys.trainer(tmp_path)
    # On the command line Lightning accepts it on CUDA only.
    trainer.strategy.precision_plugin = BitsandbytesPrecision("nf4", torch.float32)
    with pytest.raises(ConfigError, match="drop the plugin and give CausalLM quantization='nf4' or 'int8'"):
        trainer.fit(make(llama_folder, quantization=None), loader())
