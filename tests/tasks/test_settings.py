"""The settings of a task: checked at once, documented for every task, and kept in checkpoints."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lightning_lora import ConfigError
from lightning_lora.cli.mistakes.options import arguments_of, nearest
from lightning_lora.tasks import CausalLM, SequenceClassifier
from lightning_lora.tasks.pretrained import PretrainedTask
from tests.support import toys

pytestmark = toys.expected_warnings


BAD = [
    ({"learning_rate": float("nan")}, "learning_rate must be a finite number greater than 0, got nan"),
    ({"learning_rate": 0}, "learning_rate must be a finite number greater than 0, got 0"),
    ({"learning_rate": -1e-4}, "learning_rate must be a finite number greater than 0, got -0.0001"),
    ({"learning_rate": float("inf")}, "learning_rate must be a finite number greater than 0, got inf"),
    ({"learning_rate": "1e-4"}, "learning_rate must be a finite number greater than 0, got '1e-4'"),
    ({"weight_decay": -0.1}, "weight_decay must be a finite number of at least 0, got -0.1"),
    ({"weight_decay": float("nan")}, "weight_decay must be a finite number of at least 0, got nan"),
    ({"weight_decay": float("inf")}, "weight_decay must be a finite number of at least 0, got inf"),
    ({"warmup_steps": -1}, "warmup_steps must be a whole number of 0 or more, got -1"),
    ({"warmup_steps": 0.1}, "warmup_steps must be a whole number of 0 or more, got 0.1"),
    ({"warmup_steps": True}, "warmup_steps must be a whole number of 0 or more, got True"),
    ({"schedule": "cosin"}, "schedule must be one of constant, linear, cosine, got 'cosin'; did you mean 'cosine'?"),
    ({"dtype": "bf16"}, "dtype must be one of float32, bfloat16, float16, got 'bf16'"),
    (
        {"attn_implementation": "flash"},
        "attn_implementation must be one of eager, sdpa, flash_attention_2, flash_attention_3, flex_attention or null, "
        "got 'flash'",
    ),
    ({"lora": {"rank": 0}}, "rank must be at least 1, got 0"),
    ({"lora": "all"}, "lora must be a LoRAConfig, a mapping or None, got str"),
    ({"model": "./nowhere"}, "model './nowhere' is not a folder on this machine"),
    ({"model": "/no/such/model"}, "model '/no/such/model' is not a folder on this machine"),
    ({"model": "a/b/c"}, "model 'a/b/c' is not a folder on this machine"),
    ({"model": ""}, "model '' cannot be used: "),
]


@pytest.mark.parametrize(("options", "text"), BAD, ids=[str(options) for options, _ in BAD])
def test_bad_argument_is_refused_when_the_module_is_made(
    options: dict[str, Any], text: str, llama_folder: Path
) -> None:
    arguments: dict[str, Any] = {"model": str(llama_folder)} | options
    with pytest.raises(ConfigError) as caught:
        CausalLM(**arguments)
    assert text in str(caught.value)


KINDS: dict[type[PretrainedTask], dict[str, Any]] = {CausalLM: {}, SequenceClassifier: {"num_labels": 3}}


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_offers_the_shared_settings_with_their_defaults_and_help(kind: type[PretrainedTask]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    offered = parser.add_class_arguments(kind)
    shared = dict(inspect.signature(PretrainedTask).parameters)
    assert set(offered) == {*shared, *KINDS[kind]}
    assert all(action.help for action in parser._actions)
    defaults = vars(parser.get_defaults())
    assert all(defaults[name] == parameter.default for name, parameter in shared.items() if name != "model")
    help_text = " ".join(parser.format_help().split())
    assert "The learning rate *of full fine-tuning*. Adapters train at ``lora.lr_multiplier`` times" in help_text


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_is_kept_as_a_hyperparameter(kind: type[PretrainedTask], llama_folder: Path) -> None:
    module = kind(str(llama_folder), schedule="linear", **KINDS[kind])
    shared = {name: parameter.default for name, parameter in inspect.signature(PretrainedTask).parameters.items()}
    assert dict(module.hparams) == shared | {"model": str(llama_folder), "schedule": "linear"} | KINDS[kind]


def test_an_unknown_setting_of_a_base_class_gets_its_nearest_name() -> None:
    assert nearest("quantisation", arguments_of(SequenceClassifier)) == "; did you mean 'quantization'?"
