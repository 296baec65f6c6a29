from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_lora.errors import ConfigError
from lightning_lora.study.matched.checks.equal import check_equal
from lightning_lora.study.matched.spec import ArmSpec, read_spec, spec_of

ARMS: dict[str, Any] = {"full": None, "rank 8": {"overrides": {"model.init_args.lora.rank": 8}}}


def test_a_study_file_needs_arms_only(tmp_path: Path) -> None:
    file = tmp_path / "ranks.yaml"
    file.write_text(yaml.safe_dump({"configs": ["sft.yaml"], "arms": ARMS, "learning_rates": "1e-4"}))
    spec, configs, overrides = read_spec(file)
    assert (spec.name, spec.baseline, spec.primary) == ("ranks", "full", "rank 8")
    assert (spec.seeds, spec.selection_seeds, spec.band) == (3, (0,), 0.005)
    assert spec.verdict_seeds(3) == (1, 2, 3)
    assert configs == ("sft.yaml",)
    assert not overrides
    assert spec.arm("full").learning_rates == (1e-4,)
    assert (spec.evaluations, spec.aa, spec.halving, spec.batch_penalty) == (None, False, False, {})


def test_evaluations_are_on_a_log_grid_or_by_a_factor() -> None:
    assert spec_of({"arms": ARMS, "evaluations": "log"}, "s")[0].evaluations == 1.1
    assert spec_of({"arms": ARMS, "evaluations": "1.3"}, "s")[0].evaluations == 1.3


BAD = {
    "unknown setting": ({"arms": ARMS, "sedes": 3}, "the study has no setting 'sedes'; did you mean 'seeds'"),
    "unknown setting of an arm": ({"arms": {"a": None, "b": {"override": {}}}}, "arm 'b' has no setting 'override'"),
    "no arms": ({}, "there are no arms"),
    "one arm": ({"arms": {"full": None}}, "at least two arms, got \\['full'\\]"),
    "arms that are a list": ({"arms": ["full", "rank 8"]}, "arms must map names to settings"),
    "baseline": ({"arms": ARMS, "baseline": "fulll"}, "baseline 'fulll' is no arm; did you mean 'full'"),
    "primary is baseline": ({"arms": ARMS, "primary": "full"}, "'full' is both"),
    "empty sweep": ({"arms": ARMS, "learning_rates": []}, "learning_rates is empty"),
    "empty sweep of an arm": ({"arms": ARMS | {"b": {"learning_rates": []}}}, "arm 'b', learning_rates is empty"),
    "negative rate": ({"arms": ARMS, "learning_rates": [-1e-4]}, "must be positive numbers"),
    "rate that is no number": ({"arms": ARMS, "learning_rates": ["fast"]}, "must be a number, got 'fast'"),
    "band": ({"arms": ARMS, "band": 0}, "band must be a positive number"),
    "seeds": ({"arms": ARMS, "seeds": "many"}, "seeds must be a number of at least 3 for a verdict, or auto"),
    "seed twice": ({"arms": ARMS, "seeds": [1, 1, 2]}, "seeds has a seed twice"),
    "a name that leaves the folder": ({"arms": ARMS, "name": "../s"}, "name must be a text that can name a folder"),
    "an empty name": ({"arms": ARMS, "name": " "}, "name must be a text that can name a folder"),
    "a list as name": ({"arms": ARMS, "name": ["s"]}, "name must be a text that can name a folder"),
    "an arm as large as itself": (
        {"arms": {"full": {}, "rank 8": {"matched_rank": "rank 8"}}},
        "matched_rank of 'rank 8' names the arm itself",
    ),
    "no selection seeds": ({"arms": ARMS, "selection_seeds": []}, "selection_seeds is empty: name at least one seed"),
    "seeds of both kinds": ({"arms": ARMS, "seeds": [0, 1, 2]}, r"share \[0\]: a seed that chose a learning rate"),
    "name of an arm": ({"arms": ARMS | {"=1+1": None}}, "begins with a letter"),
    "configs": ({"arms": ARMS, "configs": 3}, "configs must be a list of files"),
    "evaluations": (
        {"arms": ARMS, "evaluations": "often"},
        r"evaluations \(log, or a factor such as 1.3\) must be a num",
    ),
    "evaluations that stand still": ({"arms": ARMS, "evaluations": 1}, "evaluations must be log, or above 1"),
    "aa": ({"arms": ARMS, "aa": "yes"}, "aa must be true or false, got 'yes'"),
    "halving": ({"arms": ARMS, "halving": 3}, "halving must be true or false, got 3"),
    "batch penalty of two arms": (
        {"arms": ARMS, "batch_penalty": ["full", "rank 8"]},
        "batch_penalty names four arms: {lora: {small: ARM, large: ARM}, full",
    ),
    "batch penalty without a large batch": (
        {"arms": ARMS, "batch_penalty": {"lora": {"small": "rank 8"}, "full": {"small": "full", "large": "full"}}},
        "batch_penalty names four arms",
    ),
    "batch penalty of unknown arms": (
        {
            "arms": ARMS,
            "batch_penalty": {"lora": {"small": "rank 8", "large": "rank"}, "full": {"small": "full", "large": "f"}},
        },
        "batch_penalty, lora, large 'rank' is no arm; did you mean 'rank 8'",
    ),
    "batch penalty of an arm twice": (
        {
            "arms": ARMS,
            "batch_penalty": {
                "lora": {"small": "rank 8", "large": "rank 8"},
                "full": {"small": "full", "large": "full"},
            },
        },
        "batch_penalty compares four arms, got rank 8, rank 8, full, full",
    ),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=list(BAD))
def test_a_mistake_in_a_study_file_is_one_clear_error(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_of(given, "s")


def test_a_study_file_that_cannot_be_read_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml cannot be read: No such file"):
        read_spec(tmp_path / "no.yaml")
    (tmp_path / "bad.yaml").write_text("arms: [")
    with pytest.raises(ConfigError, match=r"bad\.yaml is no YAML"):
        read_spec(tmp_path / "bad.yaml")


def arm(name: str, **changes: Any) -> ArmSpec:
    options = {"precision": "32-true", "max_epochs": 1, "max_steps": -1, "devices": 1, "strategy": "auto"}
    options = {key: changes.pop(key, value) for key, value in options.items()} | changes.pop("trainer", {})
    data = {"train": "a.jsonl", "validation": "b.jsonl", "batch_size": 8} | changes.pop("data", {})
    model = {"model": "base", "lora": None} | changes
    return ArmSpec(name, config={"trainer": options, "data": {"init_args": data}, "model": {"init_args": model}})


def test_arms_may_differ_in_what_is_compared() -> None:
    check_equal([arm("a"), arm("b", lora={"rank": 8}), arm("c", data={"batch_size": 16})])
    check_equal([arm("a", max_steps=100), arm("b", max_steps=50, data={"batch_size": 16})])


UNEQUAL = {
    "data": ({"data": {"train": "c.jsonl"}}, "differ in data .data.init_args.train: 'a.jsonl' and 'c.jsonl'"),
    "evaluation rows": ({"data": {"validation": "c.jsonl"}}, "differ in data .data.init_args.validation"),
    "length": ({"data": {"max_length": 5}}, "differ in data"),
    "precision": ({"precision": "bf16-true"}, "differ in precision"),
    "base": ({"model": "other"}, "differ in base model"),
    "precision of the base": ({"dtype": "bfloat16"}, "differ in precision of the base"),
    "validation rows": ({"trainer": {"limit_val_batches": 2}}, "differ in share of the validation rows"),
    "order": ({"trainer": {"overfit_batches": 1.0}}, "differ in order of the rows"),
    "epochs": ({"max_epochs": 2}, "differ in number of epochs"),
    "nothing": ({}, "arms 'a' and 'b' are the same"),
}


@pytest.mark.parametrize(("changes", "message"), UNEQUAL.values(), ids=list(UNEQUAL))
def test_arms_that_differ_in_what_must_be_equal_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_equal([arm("a"), arm("b", **changes)])


def test_arms_with_other_numbers_of_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="train on 800 and 400 rows"):
        check_equal([arm("a", max_steps=100), arm("b", max_steps=50)])
    with pytest.raises(ConfigError, match="train on all and 400 rows by max_steps"):
        check_equal([arm("a"), arm("b", max_steps=50)])
    batches = {"limit_train_batches": 10}
    with pytest.raises(ConfigError, match="train on 80 and 160 rows by limit_train_batches"):
        check_equal([arm("a", trainer=batches), arm("b", trainer=batches, data={"batch_size": 16})])
    check_equal([arm("a", trainer=batches), arm("b", trainer={"limit_train_batches": 5}, data={"batch_size": 16})])


@pytest.mark.parametrize("devices", [2, "2", "0,1", [0, 1], -1, "-1"])
def test_several_devices_are_refused(devices: Any) -> None:
    """The command line gives the number as a text."""
    with pytest.raises(ConfigError, match=r"trainer\.devices is .*, and each run of a study trains on one device"):
        check_equal([arm("a", devices=devices), arm("b", devices=devices, lora={"rank": 1})])


@pytest.mark.parametrize("trainer", [{"num_nodes": 2}, {"num_nodes": "2"}, {"strategy": "ddp"}])
def test_strategies_that_give_loaders_a_sampler_of_their_own_are_refused(trainer: dict[str, Any]) -> None:
    """They would shuffle rows in another order than one device."""
    message = f"{'num_nodes' if 'num_nodes' in trainer else 'strategy'} is .*, and each run of a study trains on one"
    with pytest.raises(ConfigError, match=message):
        check_equal([arm("a", trainer=trainer), arm("b", trainer=trainer, lora={"rank": 1})])


@pytest.mark.parametrize("devices", [1, "1", "auto", [3], None])
def test_one_device_is_taken(devices: Any) -> None:
    check_equal([arm("a", devices=devices), arm("b", devices=devices, lora={"rank": 1})])
