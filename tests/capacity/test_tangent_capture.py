"""Tangent capture is what gradients of the frozen weight, row by row from autograd, give by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig
from lightning_lora.batch.trial_step import observed
from lightning_lora.capacity.fixed_rows import fixed_batches
from lightning_lora.capacity.tangent_capture import tangent_capture
from tests.capacity.teacher import RankedStudent, rows
from tests.support import toys

pytestmark = toys.expected_warnings
COUNT = 96


class Measures(Callback):
    """Measures at the end of training, and computes the same from a gradient of each row."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = fixed_batches(trainer.train_dataloader, COUNT, torch.device("cpu"))
        assert batches is not None
        before = [parameter.grad for parameter in pl_module.parameters()]
        with observed(trainer, pl_module):
            self.found, self.of_groups = tangent_capture(trainer, pl_module, batches, {"layer": ["layer"]})
        assert all(one is other for one, other in zip(before, (p.grad for p in pl_module.parameters()), strict=True))
        self.expected = by_hand(pl_module, batches)


def by_hand(module: Any, batches: list[Any]) -> tuple[float, float]:
    A, B = (factor.detach().double() for factor in module.layer.lora_pair())
    if start := module.layer.lora_spec.start:
        A, B = A[:start], B[:, :start]  # the rest stays as it starts
    if module.layer.lora_spec.config.dora:
        weight = module.layer.weight + module.layer.lora_spec.scale * B @ A
        B = (module.layer.lora_magnitude.detach() / weight.norm(dim=1)).unsqueeze(1) * B
    Q_A, Q_B = torch.linalg.qr(A.T)[0], torch.linalg.qr(B)[0]
    outside_A, outside_B = torch.eye(48) - Q_A @ Q_A.T, torch.eye(48) - Q_B @ Q_B.T
    gradients = []
    for x, y in batches:
        error = (module.layer(x) - y).detach().double()
        gradients += [torch.outer(e, row) for e, row in zip(error, x.double(), strict=True)]
    whole = torch.stack(gradients)
    values = capture(whole, whole - outside_B @ whole @ outside_A)
    without = [
        capture(part, part - outside_B @ part @ outside_A)
        for part in (torch.cat([whole[:start], whole[start + 32 :]]) for start in range(0, COUNT, 32))
    ]
    spread = torch.tensor(without)
    return values, float((2 / 3 * (spread - spread.mean()).square().sum()).sqrt())


def capture(whole: Tensor, projected: Tensor) -> float:
    def signal_and_noise(each: Tensor) -> tuple[Tensor, Tensor]:
        count, mean_square, square = len(each), each.square().sum((1, 2)).mean(), each.mean(0).square().sum()
        return (count * square - mean_square) / (count - 1), count / (count - 1) * (mean_square - square)

    (signal, noise), (kept, kept_noise) = signal_and_noise(whole), signal_and_noise(projected)
    return float(kept / signal / (kept_noise / noise))


@pytest.mark.parametrize("settings", [{}, {"dora": True}, {"init": "pissa"}, {"lora_plus_ratio": 4.0}], ids=str)
def test_tangent_capture_is_that_of_row_gradients_by_hand(settings: dict[str, Any], tmp_path: Path) -> None:
    measures = Measures()
    data = DataLoader(rows("flat", 256, 1), 32)
    student = RankedStudent(4, 0, learning_rate=1e-4)
    student.lora = LoRAConfig(rank=4, alpha=32, targets=["layer"], **settings)
    torch.nn.init.normal_(student.layer.weight, std=0.05, generator=torch.Generator().manual_seed(5))
    toys.trainer(tmp_path, callbacks=[measures]).fit(student, data)
    assert measures.found.value == pytest.approx(measures.expected[0], rel=1e-4)
    assert measures.found.error == pytest.approx(measures.expected[1], rel=1e-3)
    assert measures.of_groups == {"layer": measures.found}
