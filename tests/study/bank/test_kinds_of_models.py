"""What becomes of arms of models of many kinds: exact in one batch, or in turns with the reason."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lora.study.bank.bank import ArmBank
from lightning_lora.study.bank.exactness import ApartError, why_no_rows
from tests.study.bank import arms
from tests.study.bank.kinds import Arm, Kind, Task, gap, images, rows, sequences, tokens
from tests.study.bank.odd_modules import (
    Choosing,
    Chosen,
    Experts,
    Manual,
    Penalty,
    Recomputed,
    Twice,
    centred,
    compiled,
    conv,
    counted,
    llama,
    mixture,
    net,
    observed,
    recomputing,
    replaced,
    watching,
)
from tests.support import toys

IGNORED = (
    "ignore:.*grad attribute of a Tensor that is not a leaf",
    "ignore:.*says how many experts are active",
    "ignore:`gradient_checkpointing_enable` is deprecated",
)
pytestmark = [*toys.expected_warnings, *map(pytest.mark.filterwarnings, IGNORED)]


HEAD = {"adapt_head": True}
TIED = llama(tie_word_embeddings=True)
# What these compute twice makes steps unstable at the rates of the others.
SLOW = {"a": Arm({"rank": 2}, 2e-5, 1), "b": Arm({"rank": 4}, 1e-5, 2)}
EXACT = {
    "linear": Kind(net(nn.Tanh), rows),
    "convolution": Kind(conv(lambda: nn.GroupNorm(2, 8)), images),
    "convolution with DoRA": Kind(conv(), images, lora={"dora": True}),
    "transformer": Kind(llama(), tokens),
    "DoRA": Kind(llama(), tokens, lora={"dora": True}),
    "rsLoRA": Kind(llama(), tokens, lora={"scaling": "rslora"}),
    "PiSSA": Kind(llama(), tokens, lora={"init": "pissa"}),
    "orthogonal": Kind(llama(), tokens, lora={"init": "orthogonal"}),
    "LoRA-GA": Kind(llama(), tokens, lora={"init": "gradient", "init_batches": 2}),
    "embeddings": Kind(llama(), tokens, lora={"adapt_embeddings": True}),
    "embeddings with DoRA": Kind(llama(), tokens, lora={"adapt_embeddings": True, "dora": True}),
    "head": Kind(llama(), tokens, lora=HEAD),
    "tied head of its own": Kind(TIED, tokens, lora={**HEAD, "tied_weights": "untie"}),
    "tied head adapted with the embedding": Kind(TIED, tokens, lora={**HEAD, "tied_weights": "both"}, arms=SLOW),
    "norms in full": Kind(llama(), tokens, lora={"trainable": ["*norm"]}),
    "mixture of experts without capacity": Kind(mixture("mixtral"), tokens),
    "model that is called with its own output": Kind(net(nn.Tanh), rows, task=Twice, arms=SLOW),
}
NOT_ALL = {"targets": ["0"], "exclude": ["1.*"]}
TURNS = {
    "batch normalisation": Kind(net(lambda: nn.BatchNorm1d(16)), rows, "batch normalisation (1)"),
    "own batch normalisation": Kind(watching(centred), rows, "its forward changes 1.kept"),
    "running statistics": Kind(watching(observed), rows, "its forward changes 1.kept"),
    "instance norm that keeps statistics": Kind(
        conv(lambda: nn.InstanceNorm2d(8, track_running_stats=True)), images, "its forward changes 1.running_mean"
    ),
    "counter": Kind(watching(counted), rows, "its forward changes 1.calls"),
    "spectral norm": Kind(
        net(lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))),
        rows,
        "its forward changes 1.parametrizations.weight.0._u",
        lora={"targets": ["0"]},
    ),
    "dropout": Kind(net(nn.Dropout), rows, "dropout (1)"),
    "functional dropout": Kind(watching(lambda _, x: F.dropout(x, 0.2)), rows, "draws random numbers"),
    "random numbers of python": Kind(watching(lambda _, x: x * random.random()), rows, "draws random numbers"),
    "random numbers of its own": Kind(
        watching(lambda layer, x: x * torch.rand((), generator=layer.generator)), rows, "changes 1.generator"
    ),
    "experts with a capacity": Kind(net(lambda: Experts(1.5, capacity_factor=1.5)), sequences, "capacity_factor 1.5"),
    "experts with a hidden capacity": Kind(net(lambda: Experts(1.5)), sequences, "has no rows"),
    "frozen experts with a hidden capacity": Kind(
        net(lambda: Experts(3.0)), sequences, "its outputs differ", lora=NOT_ALL
    ),
    "similarities in a batch": Kind(watching(lambda _, x: (x @ x.T).softmax(-1) @ x), rows, "its outputs differ"),
    "checkpoint": Kind(lambda: Recomputed(False), rows, "activation checkpointing"),
    "reentrant checkpoint": Kind(lambda: Recomputed(True), rows, "activation checkpointing"),
    "gradient checkpointing of transformers": Kind(recomputing, tokens, "activation checkpointing"),
    "compiled": Kind(compiled, rows, "the module is compiled"),
    "compiled block": Kind(lambda: compiled(block=True), rows, "0 is compiled"),
    "replaced forward": Kind(replaced, rows, "replaced in the object"),
    "gradient penalty": Kind(net(nn.Tanh), rows, "gradients of its inputs", task=Penalty),
    "manual optimisation": Kind(net(nn.Tanh), rows, "manual optimisation", task=Manual),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXACT.values(), ids=list(EXACT))
def test_arms_are_those_of_separate_runs_in_both_modes(kind: Kind, tmp_path: Path) -> None:
    expected = kind.apart(tmp_path / "apart")
    found, _ = kind.side_by_side(tmp_path / "turns", "turns")
    assert gap(found, expected) == 0
    found, bank = kind.side_by_side(tmp_path / "rows", "rows")
    assert bank.remark == ""
    assert bank.shared_passes[0] > 0
    assert gap(found, expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", TURNS.values(), ids=list(TURNS))
def test_arms_that_cannot_share_a_batch_are_bit_equal_and_say_why(kind: Kind, tmp_path: Path) -> None:
    expected = kind.apart(tmp_path / "apart")
    found, _ = kind.side_by_side(tmp_path / "turns", "turns")
    assert gap(found, expected) == 0
    found, bank = kind.side_by_side(tmp_path / "rows", "rows")
    assert kind.why_turns in bank.remark
    assert gap(found, expected) == 0, "the pass that finds it out leaves nothing behind"


def test_a_layer_that_takes_a_choice_of_rows_does_not_share_those_batches(tmp_path: Path) -> None:
    kind = Kind(Chosen, sequences, lora={"targets": ["layer"]}, task=Choosing)
    expected = kind.apart(tmp_path / "apart")
    found, bank = kind.side_by_side(tmp_path / "rows", "rows")
    assert gap(found, expected) < 1e-5
    assert "take a choice of rows" in bank.remark


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_arms_of_quantised_modules_are_exact(kind: str, tmp_path: Path) -> None:
    from tests.support import quantised_models

    own = Kind(
        lambda: quantised_models.quantised(kind),
        lambda generator: torch.randn(32, 128, generator=generator),
        lora={"targets": ["first", "second"]},
    )
    expected = own.apart(tmp_path / "apart")
    assert gap(own.side_by_side(tmp_path / "turns", "turns")[0], expected) == 0
    found, bank = own.side_by_side(tmp_path / "rows", "rows")
    assert gap(found, expected) == 0
    assert "the frozen weight first.weight is not the same in all arms" in bank.remark


@pytest.mark.parametrize("mode", ["turns", "rows"])
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_arms_on_one_quantised_base_are_exact(quantization: str, mode: Any, tmp_path: Path) -> None:
    model = arms.model_folder(tmp_path / "model")
    settings = {name: replace(arms.THREE[name], task={"quantization": quantization}) for name in ("one", "eight")}
    expected = arms.apart(settings, model, tmp_path / "apart")
    found, bank = arms.side_by_side(settings, model, tmp_path / mode, mode)
    assert bank.remark == ""
    assert max(arms.gap(found[name], expected[name]) for name in expected) <= (0 if mode == "turns" else 1e-5)


def test_frozen_layers_in_int8_look_at_all_rows() -> None:
    from tests.support import quantised_models

    assert "int8 layers (first) look for outliers" in why_no_rows(quantised_models.quantised("int8"))
    assert why_no_rows(quantised_models.adapted("int8")) == ""


class Teacher(Task):
    """A frozen copy that follows its student, from the optimizer step ``begins`` on."""

    begins = 1

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step >= self.begins:
            for weight in self.teacher.parameters():
                weight.data.mul_(0.9)


class LateTeacher(Teacher):
    begins = 5


@pytest.mark.parametrize("task", [Teacher, LateTeacher])
def test_arms_whose_frozen_weights_move_are_refused(task: type[Task], tmp_path: Path) -> None:
    kind = Kind(net(nn.Tanh), rows, task=task)
    made = {name: kind.made(arm, tmp_path / name) for name, arm in kind.arms.items()}
    found = ArmBank("turns").run({name: kind.run(*made[name]) for name in made})
    for error in found.values():
        assert isinstance(error, ApartError)
        assert "the frozen weight teacher.0.weight is changed in training" in str(error)
