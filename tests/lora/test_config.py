"""Settings are refused where they are written, by name, type and range."""

from __future__ import annotations

import json
import math
import re
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_lora import ConfigError, LoRAConfig, LoRAError

NAN, INF = math.nan, math.inf


class Refused(NamedTuple):
    name: str
    settings: dict[str, Any]
    words: tuple[str, ...]
    error: type[Exception] = ConfigError


REFUSED = [
    Refused("B01 rank zero", {"rank": 0}, ("rank", "at least 1", "got 0")),
    Refused("B01 rank negative", {"rank": -1}, ("rank", "at least 1", "got -1")),
    Refused("B02 rank fraction", {"rank": 1.5}, ("rank", "integer", "1.5", "float")),
    Refused("B02 rank whole float", {"rank": 8.0}, ("rank", "integer", "8.0", "float")),
    Refused("B02 rank text", {"rank": "8"}, ("rank", "integer", "'8'", "str")),
    Refused("B02 rank true", {"rank": True}, ("rank", "integer", "True", "bool")),
    Refused("B02 rank null", {"rank": None}, ("rank", "integer", "None", "NoneType")),
    Refused("B04 alpha zero", {"alpha": 0}, ("alpha", "greater than 0")),
    Refused("B04 alpha negative", {"alpha": -1.0}, ("alpha", "greater than 0", "-1.0")),
    Refused("B04 alpha NaN", {"alpha": NAN}, ("alpha", "finite", "nan")),
    Refused("B04 alpha infinite", {"alpha": INF}, ("alpha", "finite", "inf")),
    Refused("B04 alpha text", {"alpha": "x"}, ("alpha", "number", "'x'", "str")),
    Refused("B04 alpha true", {"alpha": True}, ("alpha", "number", "bool")),
    Refused("B05 dropout negative", {"dropout": -0.1}, ("dropout", "[0, 1)", "-0.1")),
    Refused("B05 dropout one", {"dropout": 1.0}, ("dropout", "[0, 1)", "1.0")),
    Refused("B05 dropout above", {"dropout": 1.5}, ("dropout", "[0, 1)", "1.5")),
    Refused("B05 dropout NaN", {"dropout": NAN}, ("dropout", "finite", "nan")),
    Refused("B05 dropout text", {"dropout": "0.1"}, ("dropout", "number", "str")),
    Refused("B06 multiplier NaN", {"lr_multiplier": NAN}, ("lr_multiplier", "finite", "nan")),
    Refused("B06 multiplier zero", {"lr_multiplier": 0}, ("lr_multiplier", "greater than 0")),
    Refused("B06 multiplier negative", {"lr_multiplier": -10}, ("lr_multiplier", "greater than 0", "-10")),
    Refused("B06 multiplier infinite", {"lr_multiplier": INF}, ("lr_multiplier", "finite", "inf")),
    Refused("B10 no targets", {"targets": []}, ("targets", "empty list", "'all'")),
    Refused("B10 empty targets", {"targets": ""}, ("targets", "all, attention, mlp, experts")),
    Refused("B10 empty pattern", {"targets": ["q_proj", ""]}, ("targets", "''", "non-empty")),
    Refused("B10 blank pattern", {"targets": ["  "]}, ("targets", "'  '", "non-empty")),
    Refused("B10 pattern of another type", {"targets": ["q_proj", 3]}, ("targets", "3", "name pattern")),
    Refused("targets null", {"targets": None}, ("targets", "list of name patterns", "None")),
    Refused("targets misspelt", {"targets": "atention"}, ("'atention'", "did you mean 'attention'")),
    Refused("targets a bare name", {"targets": "q_proj"}, ("targets", "For a single pattern write ['q_proj']")),
    Refused("exclude a bare name", {"exclude": "q_proj"}, ("exclude", "list", "'q_proj'")),
    Refused("trainable a bare name", {"trainable": "score"}, ("trainable", "list", "'score'")),
    Refused("rank pattern a list", {"rank_pattern": ["q_proj"]}, ("rank_pattern", "map")),
    Refused("rank pattern value", {"rank_pattern": {"q_proj": 0}}, ("rank_pattern['q_proj']", "at least 1")),
    Refused("rank pattern type", {"rank_pattern": {"q_proj": "8"}}, ("rank_pattern['q_proj']", "integer", "str")),
    Refused("rank pattern empty name", {"rank_pattern": {"": 8}}, ("rank_pattern", "''", "non-empty")),
    Refused("alpha pattern value", {"alpha_pattern": {"q_proj": NAN}}, ("alpha_pattern['q_proj']", "finite")),
    Refused("scaling", {"scaling": "rs_lora"}, ("scaling", "standard, rslora", "did you mean 'rslora'")),
    Refused("init", {"init": "eva"}, ("init", "default, gaussian", "'eva'")),
    Refused("B34 float16 adapters", {"adapter_dtype": "float16"}, ("cannot be trained in float16", "bfloat16")),
    Refused("adapter dtype", {"adapter_dtype": "float23"}, ("adapter_dtype", "did you mean 'float32'")),
    Refused("adapter dtype whole", {"adapter_dtype": torch.int8}, ("adapter_dtype", "float32", "int8")),
    Refused("adapt head a number", {"adapt_head": 1}, ("adapt_head", "true or false", "1")),
    Refused("adapt embeddings text", {"adapt_embeddings": "no"}, ("adapt_embeddings", "true or false", "'no'")),
    Refused("B61 unknown setting", {"rnak": 8}, ("no setting 'rnak'", "did you mean 'rank'")),
    Refused("PEFT's name", {"lora_alpha": 8}, ("no setting 'lora_alpha'", "did you mean 'alpha'")),
]


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.name)
def test_bad_settings_are_refused_by_name(row: Refused) -> None:
    with pytest.raises(row.error) as error:
        LoRAConfig.from_dict(row.settings)
    assert isinstance(error.value, LoRAError)
    assert isinstance(error.value, ValueError)
    for word in row.words:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


@pytest.mark.parametrize("settings", [None, 8, "rank: 8", ["rank", 8]])
def test_what_is_no_mapping_is_refused(settings: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(type(settings).__name__)):
        LoRAConfig.from_dict(settings)


def test_a_target_named_twice_counts_once_and_is_told() -> None:
    with pytest.warns(UserWarning, match=r"targets names 'q_proj' more than once") as record:
        config = LoRAConfig(targets=["q_proj", "v_proj", "q_proj"])
    assert config.targets == ("q_proj", "v_proj")
    assert record[0].filename == __file__


def test_a_config_works_without_arguments() -> None:
    config = LoRAConfig()
    assert (config.rank, config.alpha, config.targets, config.dropout) == (32, 32.0, "all", 0.0)
    assert (config.scaling, config.init, config.lr_multiplier) == ("standard", "default", 10.0)
    assert (config.adapt_head, config.adapt_embeddings) == (False, False)
    assert (config.trainable, config.exclude, config.rank_pattern, config.alpha_pattern) == ((), (), {}, {})


def test_a_config_cannot_be_changed_afterwards() -> None:
    with pytest.raises(AttributeError):
        LoRAConfig().rank = 4  # pyright: ignore[reportAttributeAccessIssue]
    ranks = {"q_proj": 4}
    config = LoRAConfig(rank_pattern=ranks)
    ranks["q_proj"] = 0
    assert config.rank_pattern == {"q_proj": 4}


@pytest.mark.parametrize("rank", [1, 4, 32])
def test_scale_is_alpha_over_rank_or_its_root(rank: int) -> None:
    assert LoRAConfig(scaling="standard").scale(rank, 32.0) == 32.0 / rank
    assert LoRAConfig(scaling="rslora").scale(rank, 32.0) == pytest.approx(32.0 / rank**0.5, rel=1e-15)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "torch.bfloat16"])
def test_a_dtype_is_kept_as_its_name(dtype: Any) -> None:
    assert LoRAConfig(adapter_dtype=dtype).adapter_dtype == "bfloat16"


NAMES = st.lists(st.sampled_from(["q_proj", "*.mlp.*", "layers.0.*", "score"]), unique=True)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "rank": st.integers(1, 4096),
            "alpha": st.floats(1e-3, 1e6) | st.integers(1, 100),
            "targets": st.sampled_from(["all", "attention", "mlp", "experts"]) | NAMES.filter(bool),
            "exclude": NAMES,
            "trainable": NAMES,
            "rank_pattern": st.dictionaries(st.sampled_from(["q_proj", "*.mlp.*"]), st.integers(1, 64)),
            "alpha_pattern": st.dictionaries(st.sampled_from(["q_proj", "*.mlp.*"]), st.floats(0.1, 64)),
            "dropout": st.floats(0, 0.99),
            "scaling": st.sampled_from(["standard", "rslora"]),
            "adapt_head": st.booleans(),
            "adapter_dtype": st.sampled_from([None, "float32", "bfloat16"]),
        },
    )
)
def test_settings_survive_json(settings: dict[str, Any]) -> None:
    config = LoRAConfig(**settings)
    assert LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert LoRAConfig.from_dict(config) is config


def test_plain_settings_hold_every_field_and_no_tuple() -> None:
    plain = LoRAConfig(targets=["a"], exclude=["b"], trainable=["c"], rank_pattern={"a": 2}).to_dict()
    assert list(plain) == list(LoRAConfig.__dataclass_fields__)
    assert {type(value) for value in plain.values()} <= {int, float, str, bool, list, dict, type(None)}


def test_batches_of_a_start_that_measures_no_gradient_are_told_once() -> None:
    with pytest.warns(UserWarning, match=r"init_batches=4 is not used: init='pissa'") as told:
        LoRAConfig(init="pissa", init_batches=4)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoRAConfig(init="gradient", init_batches=4)
        LoRAConfig(init="pissa", init_batches=LoRAConfig.init_batches)
