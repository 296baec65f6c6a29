"""Probes of modules with a magnitude (DoRA) and with a start along the gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_lora import BatchProbe, LoRAConfig, RankProbe
from lightning_lora.lora.gradient_start import gradient_init, waiting_layers
from lightning_lora.study import branch
from lightning_lora.study.rank_branches import grown_module, raised_ranks
from tests.study.student import Student, loader
from tests.support import toys

pytestmark = toys.expected_warnings


class Validated(Student):
    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.losses(batch).mean())


def student(settings: dict[str, Any]) -> Student:
    module = Validated()
    module.lora = LoRAConfig.from_dict({"rank": 4, "targets": ["layer"]} | settings)
    torch.nn.init.normal_(module.layer.weight, std=0.05, generator=torch.Generator().manual_seed(5))
    return module


def probes(**settings: Any) -> list[RankProbe | BatchProbe]:
    return [
        RankProbe(min_steps=3, min_epoch=0, **settings),
        BatchProbe(ratios=(0.5, 1.0), min_steps=3, min_epoch=0, **settings),
    ]


@pytest.mark.parametrize("settings", [{"dora": True}, {"init": "gradient"}], ids=str)
def test_a_run_is_the_same_with_both_probes(settings: dict[str, Any], tmp_path: Path) -> None:
    def trained(*callbacks: Callback) -> Student:
        torch.manual_seed(0)
        module = student(settings)
        toys.trainer(tmp_path, callbacks=list(callbacks)).fit(module, loader(320, 0), loader(32, 5))
        return module

    both = probes(at=4)
    assert toys.same(*map(toys.snapshot, (trained(), trained(*both))))
    assert all(probe.result is not None and probe.result.step == 4 for probe in both)


def test_growth_of_a_magnitude_layer_changes_no_output(tmp_path: Path) -> None:
    module = student({"dora": True})
    toys.trainer(tmp_path).fit(module, loader(128, 0))
    grown: Any = grown_module(module, raised_ranks(module, 2), 0)
    x = torch.randn(16, 48)
    assert grown.layer.lora_spec.rank == 8
    torch.testing.assert_close(grown.layer(x), module.layer(x), rtol=0, atol=1e-6)
    assert torch.equal(grown.layer.lora_magnitude, module.layer.lora_magnitude)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("place", [0, 1], ids=["rank", "batch"])
def test_branches_of_a_fresh_module_share_one_start_along_the_gradient(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, starts = student({"init": "gradient", "init_batches": 2}), []

    class Noting(branch._Rates):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            starts.append([factor.detach().clone() for factor in pl_module.layer.lora_pair()])
            super().on_train_start(trainer, pl_module)

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 0:
                starts.append([factor.detach().clone() for factor in pl_module.layer.lora_pair()])

    monkeypatch.setattr(branch, "_Rates", Noting)
    probes()[place].run(module, loader(128, 0, 16), loader(32, 5))
    by_hand: Any = student({"init": "gradient", "init_batches": 2})
    by_hand.configure_model()
    batches = list(loader(128, 0, 16))[:2]
    gradient_init(by_hand, lambda batch: by_hand.losses(batch).mean(), batches)
    assert len(starts) >= 4
    for A, B in starts:
        expected = by_hand.layer.lora_pair()
        torch.testing.assert_close((A[:8], B[:, :8]), tuple(factor.detach() for factor in expected))
    assert not waiting_layers(module)  # the module of the user is as fresh as it was
