"""What a plan counts is what `fit` trains, for every way to set LoRA up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader
from typing_extensions import override

import lightning_lora as ll
from lightning_lora.callbacks import LoRA, PlannedRun
from lightning_lora.files.adapter.save_load import save_adapter
from lightning_lora.lora.layers.adapted import factor_parameters
from lightning_lora.planning.plan import Plan
from tests.support import toys

pytestmark = [
    pytest.mark.slow,
    *toys.expected_warnings,
    pytest.mark.filterwarnings("ignore:rank [0-9]+ is more than"),
    pytest.mark.filterwarnings("ignore:.*parameters outside of lora_root"),
]


class Data(LightningDataModule):
    """Rows of the toy modules."""

    def __init__(self, batch_size: int = 2) -> None:
        super().__init__()
        self.batch_size = batch_size

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return toys.loader(batch_size=self.batch_size)


class Headed(toys.Plain):
    """A network and a head beside it; the step builds on both."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(2, 2)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.net(x))


def planned(module: LightningModule, callbacks: Any = None, **options: Any) -> Plan:
    """A plan of objects whose classes a config names."""
    classes = {"model": type(module), "data": Data}
    config = {name: {"class_path": f"{each.__module__}.{each.__qualname__}"} for name, each in classes.items()}
    trainer = {} if callbacks is None else {"trainer": {"callbacks": callbacks}}
    return ll.plan(module, Data(), calibrate=False, config=config, **trainer, **options)


def fitted(made: Plan, module: LightningModule, folder: Path) -> tuple[LightningModule, PlannedRun]:
    """The run that the settings of a plan give."""
    assert made.config is not None
    by_name = {each["class_path"].rpartition(".")[2]: each["init_args"] for each in made.config["trainer"]["callbacks"]}
    run = PlannedRun(**by_name["PlannedRun"])
    callbacks = [LoRA(**by_name["LoRA"]), run] if "LoRA" in by_name else [run]
    settings = made.settings
    steps = {"max_epochs": 1, "accumulate_grad_batches": settings["accumulate_grad_batches"]}
    trainer = toys.trainer(folder, callbacks=callbacks, **steps)
    trainer.fit(module, datamodule=Data(settings["batch_size"]))
    return module, run


SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "targets": {"targets": ["first"]},
    "an excluded layer": {"exclude": ["second"]},
    "a rank of its own": {"rank_pattern": {"first": 3}},
    "pissa": {"init": "pissa"},
    "gradient": {"init": "gradient", "init_batches": 2},
    "orthogonal": {"init": "orthogonal"},
    "dora": {"dora": True},
    "bfloat16": {"adapter_dtype": "bfloat16"},
    "a module in full": {"targets": ["first"], "trainable": ["second"]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_parameters_memory_and_files_are_those_of_a_fit(name: str, tmp_path: Path) -> None:
    callback = LoRA({"rank": 2, **SETTINGS[name]})
    made = planned(toys.Plain(), [callback])
    module, run = fitted(made, toys.Plain(), tmp_path)
    assert run.measured["trained_parameters"] == run.planned["trained_parameters"]
    assert run.measured["steps"] == run.planned["steps"]
    row = next(row for row in made.capacity if row.rank == made.settings["rank"])
    parameters = made.to_dict()["parameters"]
    assert row.parameters == parameters["trained"] == ll.count_parameters(module).trainable
    assert parameters["total"] == ll.count_parameters(module).total
    memory = made.memory["lora"]
    assert memory is not None
    assert memory.adapters == sum(factor.nbytes for factor in factor_parameters(module).values())
    (optimizer,) = module.trainer.optimizers
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert memory.optimizer - sum(value.nbytes for value in states) in range(64 * len(states))
    file = save_adapter(module, tmp_path / "adapter") / "adapter_model.safetensors"
    assert made.to_dict()["disk"]["adapter"] == pytest.approx(file.stat().st_size, abs=600)


CALLBACKS: dict[str, Any] = {
    "an object": [LoRA({"rank": 2, "targets": ["first"]}, root="net")],
    "alone": LoRA({"rank": 2, "targets": ["first"]}, root="net"),
    "in a config": [
        {
            "class_path": "lightning_lora.callbacks.LoRA",
            "init_args": {"config": {"rank": 2, "targets": ["first"]}, "root": "net"},
        }
    ],
    "by a longer path": [
        {
            "class_path": "lightning_lora.callbacks.lora.LoRA",
            "init_args": {"config": {"rank": 2, "targets": ["first"]}, "root": "net"},
        }
    ],
}


@pytest.mark.parametrize("given", CALLBACKS)
def test_the_callback_counts_as_fit_takes_it(given: str, tmp_path: Path) -> None:
    module = Headed()
    before = toys.snapshot(module)
    made = planned(module, CALLBACKS[given])
    assert type(module) is Headed
    assert toys.same(before, toys.snapshot(module))
    assert made.targets == "first"
    assert made.config is not None
    assert made.config["trainer"]["callbacks"][0]["init_args"]["root"] == "net"
    _, run = fitted(made, Headed(), tmp_path)
    assert run.measured["trained_parameters"] == run.planned["trained_parameters"] == made.settings["rank"] * (4 + 8)


def test_what_the_callback_opens_outside_of_its_root_counts(tmp_path: Path) -> None:
    made = planned(Headed(), LoRA({"rank": 2, "targets": ["first"], "trainable": ["head"]}, root="net"))
    _, run = fitted(made, Headed(), tmp_path)
    trained = made.settings["rank"] * (4 + 8) + (2 * 2 + 2)
    assert run.measured["trained_parameters"] == run.planned["trained_parameters"] == trained
    assert next(row for row in made.capacity if row.rank == 1).parameters == 4 + 8 + 6


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([LoRA({"rank": 2}), LoRA({"rank": 3})], "two LoRA callbacks"),
        ([{"class_path": "lightning_lora.callbacks.LoRA", "init_args": {"config": {"rang": 2}}}], "no setting 'rang'"),
        ([{"class_path": "lightning_lora.callbacks.LoRA", "init_args": {"rank": 2}}], "unexpected keyword"),
        ([LoRA({"rank": 2}, root="nets")], "lora_root 'nets' is not a submodule"),
    ],
)
def test_a_callback_that_fit_refuses_is_refused(callbacks: Any, message: str) -> None:
    with pytest.raises(ll.LoRAError, match=message):
        planned(toys.Plain(), callbacks)


def test_a_module_with_other_settings_refuses_the_callback() -> None:
    with pytest.raises(ll.ConfigError, match="has LoRA settings of its own"):
        planned(toys.Toy(), LoRA({"rank": 3}))
    assert planned(toys.Toy(), LoRA({"rank": 2})).method == "lora"


def test_ranks_that_a_start_refuses_are_not_planned() -> None:
    made = planned(toys.Plain(), LoRA({"rank": 2, "init": "orthogonal"}))
    assert 1 not in {row.rank for row in made.capacity}
    assert made.settings["rank"] % 2 == 0


@pytest.mark.parametrize(("rank", "said"), [(64, True), (2, False)])
def test_a_rank_above_what_layers_hold_is_said_once(rank: int, said: bool) -> None:
    made = planned(toys.Plain(), LoRA({"rank": rank}))
    assert made.settings["rank"] == rank
    text = " ".join(str(made).split())
    assert text.count(f"rank {rank} is more than 2 of 2 adapted layers can hold") == int(said)


RATES: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, "adapters train at 10 times this rate"),
    "LoRA+": ({"lora_plus_ratio": 16}, "adapters train at 10 (B: 160, LoRA+) times this rate"),
    "a pattern": ({"lr_multiplier_pattern": {"first": 5}}, "10 times this rate, first at 5 (lr_multiplier_pattern)"),
    "full": ({"targets": ["first"], "trainable": ["second"]}, "what is trained in full at the rate itself"),
}


class ByTheRule(ll.LoRAMixin, toys.Plain):
    """Takes its groups from the mixin."""

    @override
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.lora_parameter_groups(0.001))


@pytest.mark.parametrize("name", RATES)
def test_the_page_says_what_the_rate_applies_to(name: str) -> None:
    settings, said = RATES[name]
    made = planned(ByTheRule(lora={"rank": 2, **settings}))
    assert made.settings["learning_rate"] == pytest.approx(0.001)
    assert said in " ".join(str(made).split())


def test_a_rate_that_knows_no_rule_is_told_as_it_is() -> None:
    text = " ".join(str(planned(toys.Plain(), LoRA({"rank": 2}))).split())
    assert "the module's own optimizer; it gives adapters 0.05" in text
    assert "10 times" not in text


class Opaque(toys.Plain):
    """Its step asks for values, which a trace does not have."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss if bool(torch.from_numpy(loss.detach().numpy()) > 0) else loss * 2


class Unbuilt(toys.Plain):
    """Asks for values while it is built."""

    @override
    def configure_model(self) -> None:
        self.mean = float(self.net.first.weight.detach().numpy().mean())


@pytest.mark.parametrize("kind", [Opaque, Unbuilt])
def test_a_step_that_cannot_be_traced_is_planned_without_memory(kind: type[LightningModule], tmp_path: Path) -> None:
    made = planned(kind(), LoRA({"rank": 2}))
    text = " ".join(str(made).split())
    assert "not traced, because " in text
    assert f"of {kind.__name__} cannot be traced" in text
    assert "whether it fits is not known" in made.sentence
    assert made.fits
    assert made.memory == {"lora": None, "qlora": None, "full": None}
    assert set(made.not_traced) == set(made.to_dict()["not_traced"]) == {"lora", "full"}
    assert max(map(len, str(made).splitlines())) <= 80
    _, run = fitted(made, kind(), tmp_path)
    assert {each: run.measured[each] for each in ("steps", "tokens", "trained_parameters")} == {
        each: run.planned[each] for each in ("steps", "tokens", "trained_parameters")
    }
