"""The progress display shows the right numbers in the right place and never disturbs a run."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora.callbacks.progress import LoRAProgressBar, Throughput
from lightning_lora.errors import ConfigError
from lightning_lora.lora.adapter import inject_lora
from lightning_lora.lora.config import LoRAConfig
from tests.support import toys

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*is deprecated"),
]


class Tiny(LightningModule):
    """A module whose loss is exactly ``batch_idx + 1`` for any weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | dict[str, Tensor] | None:
        return self.layer.weight.sum() * 0 + batch_idx + 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.25)


class TinyWithValidation(Tiny):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.tensor(0.125))
        self.log("accuracy", 0.5)


def batches(count: int) -> Iterable[Any]:
    return DataLoader([torch.zeros(4) for _ in range(2 * count)], batch_size=2)  # pyright: ignore[reportArgumentType]


def fit(module: LightningModule, bar: LoRAProgressBar, data: Any = None, val: Any = None, **options: Any) -> Trainer:
    quiet = {"enable_checkpointing": False, "logger": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(**{"max_epochs": 1, **quiet, **options}, callbacks=[bar])
    trainer.fit(module, batches(10) if data is None else data, val)
    return trainer


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if "epoch" in line]


def test_it_is_the_trainers_progress_bar_and_the_only_one(capsys: pytest.CaptureFixture[str]) -> None:
    bar = LoRAProgressBar()
    trainer = fit(Tiny(), bar)
    assert trainer.progress_bar_callback is bar
    assert len(printed(capsys)) == 1


def test_a_plain_line_says_loss_rate_speed_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Tiny(), LoRAProgressBar(every_n_steps=5), max_steps=10)
    first, second = printed(capsys)
    assert re.fullmatch(r"epoch 0, step 5/10  loss 5  lr 0.25  rows/s [\d,.]+  memory [\d,]+ MB", first)
    assert second.startswith("epoch 0, step 10/10  loss 10  lr 0.25  rows/s ")


@pytest.mark.parametrize("force", ["FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"])
def test_plain_output_has_no_control_characters(
    force: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(force, "1")
    fit(TinyWithValidation(), LoRAProgressBar(every_n_steps=1), val=batches(1))
    out = capsys.readouterr().out
    assert out.isascii()
    assert all(character.isprintable() or character == "\n" for character in out)
    assert len(out.splitlines()) == 11


def test_steps_after_the_last_full_interval_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Tiny(), LoRAProgressBar(every_n_steps=4), max_epochs=2, data=batches(3))
    assert [line.split("  ")[0] for line in printed(capsys)] == ["epoch 1, step 4", "epoch 1, step 6"]


def test_one_line_per_validation_with_its_metrics_only(capsys: pytest.CaptureFixture[str]) -> None:
    class Logged(TinyWithValidation):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("train_accuracy", 0.75)
            return super().training_step(batch, batch_idx)

    fit(Logged(), LoRAProgressBar(every_n_steps=100), val=batches(1), max_epochs=2, val_check_interval=5)
    lines = [line for line in printed(capsys) if line.startswith("validation")]
    assert lines == [
        f"validation at epoch {epoch}, step {step}  val_loss 0.125  accuracy 0.5"
        for epoch, step in ((0, 5), (0, 10), (1, 15), (1, 20))
    ]


def test_a_validation_without_metrics_still_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    class Silent(Tiny):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            return None

    fit(Silent(), LoRAProgressBar(every_n_steps=100), val=batches(1))
    assert "validation at epoch 0, step 10" in printed(capsys)


def test_the_loss_is_not_divided_by_the_accumulation(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Tiny(), LoRAProgressBar(every_n_steps=1), accumulate_grad_batches=2)
    assert [line.split("  ")[1] for line in printed(capsys)] == [f"loss {loss}" for loss in (2, 4, 6, 8, 10)]


@pytest.mark.parametrize("on_epoch", [False, True])
def test_a_logged_train_loss_is_shown_instead(on_epoch: bool, capsys: pytest.CaptureFixture[str]) -> None:
    class Logged(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("train_loss", float(100 + batch_idx), on_step=True, on_epoch=on_epoch)
            return super().training_step(batch, batch_idx)

    fit(Logged(), LoRAProgressBar(every_n_steps=5))
    assert [line.split("  ")[1] for line in printed(capsys)] == ["loss 104", "loss 109"]


def test_last_epochs_mean_is_not_shown_as_this_steps_loss(capsys: pytest.CaptureFixture[str]) -> None:
    class LoggedPerEpoch(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("train_loss", 100.0, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    fit(LoggedPerEpoch(), LoRAProgressBar(every_n_steps=5), max_epochs=2)
    assert [line.split("  ")[1] for line in printed(capsys)] == ["loss 5", "loss 10"] * 2


def test_the_adapters_rate_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    class Adapted(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)
            inject_lora(self, LoRAConfig(rank=1, targets=["layer"]))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.layer(batch).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            adapters = [p for name, p in self.layer.named_parameters() if "lora" in name]
            return torch.optim.SGD([{"params": self.head.parameters(), "lr": 0.5}, {"params": adapters, "lr": 0.125}])

    fit(Adapted(), LoRAProgressBar())
    assert "  lr 0.125  " in printed(capsys)[0]


def test_manual_optimization_with_two_steps_per_batch(capsys: pytest.CaptureFixture[str]) -> None:
    class Manual(toys.ByHand, Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            for rate in self.optimizers():  # pyright: ignore[reportGeneralTypeIssues]
                rate.step()
            return {"loss": torch.tensor(batch_idx + 1.0)}

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), lr=rate) for rate in (0.25, 0.5)], []

    fit(Manual(), LoRAProgressBar(every_n_steps=5))
    assert [line.split("  ")[:3] for line in printed(capsys)] == [
        [f"epoch 0, step {step}", f"loss {step // 2}", "lr 0.25/0.5"] for step in (6, 10, 16, 20)
    ]


@pytest.mark.parametrize("output", [None, torch.ones(3), {}], ids=["none", "vector", "no-loss"])
def test_a_missing_loss_is_left_out(output: Any, capsys: pytest.CaptureFixture[str]) -> None:
    class Lossless(toys.ByHand, Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.optimizers().step()  # pyright: ignore[reportAttributeAccessIssue]
            return output

    fit(Lossless(), LoRAProgressBar())
    assert re.match(r"epoch 0, step 10  lr 0.25  rows/s", printed(capsys)[0])


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    bar = LoRAProgressBar(every_n_steps=1)
    bar.disable()  # what Lightning's setup calls off rank zero
    fit(TinyWithValidation(), bar, val=batches(1))
    assert not printed(capsys)


def test_results_do_not_depend_on_the_display(capsys: pytest.CaptureFixture[str]) -> None:
    class Learning(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.dropout(self.layer(batch + 1), 0.5).square().mean()

    weights = []
    for every_n_steps in (1, 1000):
        torch.manual_seed(0)
        module = Learning()
        fit(module, LoRAProgressBar(every_n_steps))
        weights.append(module.layer.weight.detach().clone())
    assert torch.equal(*weights)


def test_zero_steps_between_lines_are_refused() -> None:
    with pytest.raises(ConfigError, match="every_n_steps must be at least 1, got 0"):
        LoRAProgressBar(every_n_steps=0)


def test_tokens_per_second_are_shown_when_known(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Tiny(), LoRAProgressBar(), data=DataLoader([{"input_ids": row} for row in torch.zeros(2, 5, dtype=torch.long)]))  # pyright: ignore[reportArgumentType]
    assert "  tokens/s " in printed(capsys)[0]


def test_throughput_leaves_pauses_out_and_starts_a_new_window(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    throughput = Throughput()
    for second in (1.0, 2.0):
        now = second
        throughput.add({"input_ids": torch.zeros(2, 5)})
    throughput.pause()
    now = 50.0
    throughput.resume()
    assert throughput.read() == ("tokens", 10.0)
    assert throughput.read() is None
    now = 54.0
    throughput.add(torch.zeros(2, 1))
    assert throughput.read() == ("rows", 0.5)


def test_validation_time_does_not_slow_the_shown_speed(capsys: pytest.CaptureFixture[str]) -> None:
    class SlowValidation(TinyWithValidation):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            time.sleep(0.005)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            time.sleep(1.5)

    options = {"val_check_interval": 5, "num_sanity_val_steps": 0}
    fit(SlowValidation(), LoRAProgressBar(every_n_steps=10), val=batches(1), **options)
    line = next(line for line in printed(capsys) if line.startswith("epoch 0, step 10"))
    speed = re.search(r"rows/s ([\d,.]+)", line)
    assert speed is not None
    assert float(speed[1].replace(",", "")) > 20  # 20 rows; 13 a second or fewer if 1.5 s of validation counted
