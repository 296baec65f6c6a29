"""What a KL penalty holds a policy near: the model as training begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_lora import ConfigError, LoRAConfig
from lightning_lora.tasks.rl.reference import Reference
from tests.support import tiny_models
from tests.tasks.rl import policies

pytestmark = policies.EXPECTED


class Divergences(Callback):
    """The divergence from the reference in each step, and the numbers it was computed from."""

    def __init__(self) -> None:
        self.found: list[float] = []
        self.numbers: list[Any] = []

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.found.append(float(trainer.callback_metrics["kl"]))
        self.numbers.append(batch["numbers"])


def loaded(folder: Path, **options: Any) -> Any:
    """A policy whose adapter has learned something before, as has a norm that is trained in full."""
    lora = LoRAConfig(rank=2, trainable=["norm"])
    module = policies.make(folder, kl_coefficient=0.1, lora=lora, learning_rate=1e-2, **options)
    module.configure_model()
    tiny_models.wake(module, size=0.3)
    return module


@pytest.mark.parametrize("kl", ["k1", "k2"])
def test_an_adapter_that_was_loaded_is_its_own_reference(kl: str, llama_folder: Path, tmp_path: Path) -> None:
    module, seen = loaded(llama_folder, kl=kl), Divergences()
    policies.fit(module, tmp_path, max_steps=3, callbacks=[seen])
    assert module.reference.kind == "frozen"
    assert seen.found[0] == 0 < seen.found[1]


def test_the_base_is_the_reference_of_a_loaded_adapter_if_asked(llama_folder: Path, tmp_path: Path) -> None:
    module, seen = loaded(llama_folder, reference="adapter_off"), Divergences()
    policies.fit(module, tmp_path, max_steps=1, callbacks=[seen])
    assert seen.found[0] > 1e-3


def test_a_run_that_goes_on_keeps_its_reference(llama_folder: Path, tmp_path: Path) -> None:
    module = loaded(llama_folder)
    runner = policies.fit(module, tmp_path, max_steps=2)
    runner.save_checkpoint(tmp_path / "two.ckpt")
    other, seen = loaded(llama_folder), Divergences()
    policies.fit(other, tmp_path, max_steps=3, ckpt_path=tmp_path / "two.ckpt", callbacks=[seen])
    assert isinstance(other.reference, Reference)
    assert module.reference._frozen.keys() == other.reference._frozen.keys()
    for name, tensor in module.reference._frozen.items():
        assert torch.equal(tensor, other.reference._frozen[name])
    assert len(seen.found) == 1
    assert seen.found[0] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "precomputed", "kl_coefficient": 0.1}, "must be one of adapter_off, frozen or null"),
        ({"reference": "frozen"}, "no effect with kl_coefficient=0"),
    ],
)
def test_references_that_make_no_sense_are_refused(options: dict[str, Any], message: str, llama_folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        policies.make(llama_folder, **options)


def test_the_reference_is_exactly_the_policy_before_the_first_step(llama_folder: Path, tmp_path: Path) -> None:
    for dtype in ("32-true", "bf16-true"):
        seen = Divergences()
        module = policies.make(llama_folder, kl_coefficient=0.1, epochs=2)
        policies.fit(module, tmp_path, max_steps=1, callbacks=[seen], precision=dtype)
        numbers = seen.numbers[0]
        assert numbers["old_logprobs"].any()
        assert torch.equal(numbers["old_logprobs"], numbers["ref_logprobs"]), dtype
        assert numbers["ref_logprobs"].dtype is torch.float32
