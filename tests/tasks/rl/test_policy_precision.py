"""Sampler, learner and reference of a policy compute in the precision of the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_lora.tasks.rl.sampling.in_process import InProcessSampler
from tests.support import toys
from tests.tasks.rl import policies

pytestmark = policies.EXPECTED


class Passes(Callback):
    """The types that the layers of the model compute in, and how far sampler and learner are apart in each step."""

    def __init__(self) -> None:
        self.types: list[torch.dtype] = []
        self.shares: list[float] = []
        self.of_numbers: set[torch.dtype] = set()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layer: Any = pl_module.get_submodule("model.model.layers.0.self_attn.q_proj")
        layer.register_forward_hook(lambda _module, _args, output: self.types.append(output.dtype))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.shares.append(batch["statistics"].get("sampler_mismatch_share", 0.0))
        self.of_numbers |= {
            batch["numbers"][name].dtype for name in ("sampler_logprobs", "old_logprobs", "ref_logprobs")
        }


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_sampler_learner_and_reference_compute_in_one_precision(
    precision: Any, llama_folder: Path, tmp_path: Path
) -> None:
    seen = Passes()
    module = policies.make(llama_folder, sampler=InProcessSampler(), minibatches=2, kl_coefficient=0.1)
    validation = policies.prompt_loader(2, shuffle=False)
    options = {"validation": validation, "max_steps": 4, "precision": precision, "callbacks": [seen]}
    policies.fit(module, tmp_path, **options)
    assert set(seen.types) == {torch.float32 if precision == "32-true" else torch.bfloat16}
    assert max(seen.shares) < 0.1
    assert seen.of_numbers == {torch.float32}


def test_a_policy_is_evaluated_where_bfloat16_is_the_default_type(llama_folder: Path, tmp_path: Path) -> None:
    """Lightning makes it that in an evaluation with bf16-true: random numbers would be rounded to it."""
    module = policies.make(llama_folder, sampler=InProcessSampler())
    runner = toys.trainer(tmp_path, precision="bf16-true")
    (metrics,) = runner.validate(module, policies.prompt_loader(2, shuffle=False), verbose=False)
    assert metrics["val_reward"] > 0
