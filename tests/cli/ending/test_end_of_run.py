"""A run ends with a picture of its losses and a few lines: where its files are, and the commands that come next."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_lora.callbacks import AdapterCheckpoint
from lightning_lora.cli.embedded import MODEL
from lightning_lora.cli.ending import end_of_run
from lightning_lora.cli.ending.end_of_run import EndOfRun
from lightning_lora.cli.ending.loss_curve import draw
from lightning_lora.study.report.runs.losses import LossCurve, read_losses, read_metrics, smoothed, validation_metric
from tests.support import toys, warm
from tests.support.commands import COMMAND, EMBEDDED, configs, lightning_lora
from tests.support.toys import Plain, Toy

pytestmark = toys.expected_warnings
PNG = b"\x89PNG"


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The lines that a run in ``tmp_path`` has ended with."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    return lambda: [text for record in caplog.records if (text := record.getMessage()).startswith("run in")]


def fit(folder: Path, *callbacks: Callback, module: LightningModule | None = None, **options: Any) -> EndOfRun:
    ending = EndOfRun()
    ckpt_path = options.pop("ckpt_path", None)
    settings = {"callbacks": [AdapterCheckpoint(), *callbacks, ending], "enable_checkpointing": True} | options
    runner = toys.trainer(folder, **settings)
    torch.manual_seed(0)  # adapters and their order of training are the same in every run
    runner.fit(module or Toy(), toys.loader(), toys.loader(2), ckpt_path=ckpt_path)
    return ending


@pytest.mark.slow
def test_a_module_of_the_user_is_told_what_applies(tmp_path: Path, told: Any) -> None:
    ending = fit(tmp_path, max_epochs=3)
    (text,) = told()
    lines = text.splitlines()
    last = max((tmp_path / "checkpoints").iterdir(), key=os.path.getmtime)
    assert lines[0] == (
        f"run in .: adapter adapters/last, last checkpoint checkpoints/{last.name}, loss curve loss.png, "
        "report report.html"
    )
    assert ending.curve.best is not None
    step, value = ending.curve.best
    assert lines[1].startswith(f"best val_loss {value:.4g} at step {step}")
    # Neither text nor a base on disk: the adapter can be exported.
    assert lines[2:] == ["  lightning-lora export adapters/last exported"]
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    assert list(ending.curve.train) == list(range(1, 13))
    assert list(ending.curve.validation) == [4, 8, 12]


def test_best_and_last_checkpoint_are_told_apart(tmp_path: Path, told: Any) -> None:
    keeper = ModelCheckpoint(monitor="val_loss", filename="{step}", save_last=True, mode="max")
    fit(tmp_path, keeper, max_epochs=2)
    (text,) = told()
    assert f"best checkpoint checkpoints/{Path(keeper.best_model_path).name}, " in text
    assert "last checkpoint checkpoints/last.ckpt, " in text


def test_a_run_that_writes_nothing_says_nothing(tmp_path: Path, told: Any) -> None:
    fit(tmp_path, module=Plain(), enable_checkpointing=False)
    fit(tmp_path, fast_dev_run=True)
    assert told() == []
    assert not list(tmp_path.rglob("*.png"))


class Fails(Callback):
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 6:
            raise RuntimeError("on purpose")


def test_a_run_that_fails_tells_of_the_files_that_exist(tmp_path: Path, told: Any) -> None:
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(tmp_path, Fails(), max_epochs=3)
    (text,) = told()
    assert "adapter adapters/last" in text
    assert "best val_loss" in text
    assert (tmp_path / "loss.png").is_file()


def test_a_picture_that_fails_is_one_warning(tmp_path: Path, told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(end_of_run, "draw", full)
    with pytest.warns(UserWarning, match=r"loss.png is not made: OSError: No space left") as caught:
        fit(tmp_path)
    assert sum("loss.png" in str(warning.message) for warning in caught) == 1
    (text,) = told()
    assert "loss.png" not in text


@pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning")
def test_the_curve_of_a_continued_run_holds_both_parts(tmp_path: Path) -> None:
    logger = {"log_every_n_steps": 1, "enable_checkpointing": True}
    first = fit(tmp_path, logger=CSVLogger(tmp_path, "runs"), max_epochs=1, module=Logged(), **logger)
    (checkpoint,) = (tmp_path / "runs/version_0/checkpoints").glob("*.ckpt")
    second = fit(
        tmp_path, logger=CSVLogger(tmp_path, "runs"), max_epochs=2, module=Logged(), ckpt_path=checkpoint, **logger
    )
    whole = fit(tmp_path, logger=False, max_epochs=2, module=Logged())
    assert second.curve.train == pytest.approx(whole.curve.train)
    assert second.curve.validation == pytest.approx(whole.curve.validation)
    assert len(first.curve.train) == 4
    # What the logger has written says the same, at the same steps.
    logged = read_metrics(tmp_path / "runs/version_0/metrics.csv")
    assert (logged.train, logged.validation) == (first.curve.train, first.curve.validation)
    # The second folder has both parts, with what they took.
    kept = read_losses(tmp_path / "runs/version_1")
    assert kept.train == pytest.approx(whole.curve.train)
    assert [tokens for tokens, _ in kept.effort.values()] == [2 * step for step in range(1, 9)]
    seconds = [seconds for _, seconds in kept.effort.values()]
    assert seconds == sorted(seconds)
    assert {step: kept.effort[step] for step in range(1, 5)} == {
        step: (tokens, pytest.approx(seconds, abs=1e-3)) for step, (tokens, seconds) in first.curve.effort.items()
    }


class Logged(Toy):
    def training_step(self, batch: list[Any], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty:UserWarning")
def test_metrics_in_the_folder_are_kept_before_the_logger_deletes_them(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, "runs", version="one")
    Path(logger.log_dir).mkdir(parents=True)
    Path(logger.log_dir, "metrics.csv").write_text("step,train_loss,val_loss\n0,5.5,\n0,,4.5\n9,1.0,\n")
    ending = EndOfRun()
    runner = toys.trainer(tmp_path, logger=logger, callbacks=[ending])
    ending.keep_metrics(runner)
    assert ending.curve.up_to(1) == LossCurve({1: 5.5}, {1: 4.5})
    runner.fit(Toy(), toys.loader(), toys.loader(2))
    assert 10 not in ending.curve.train  # a run that starts anew has losses of its own only


def test_losses_of_a_step_are_the_mean_of_its_micro_batches(tmp_path: Path) -> None:
    single = fit(tmp_path / "a", max_epochs=1, module=Frozen()).curve.train
    double = fit(tmp_path / "b", max_epochs=1, accumulate_grad_batches=2, module=Frozen()).curve.train
    assert list(double.values()) == pytest.approx([(single[1] + single[2]) / 2, (single[3] + single[4]) / 2])


class Frozen(Toy):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.lora_parameter_groups(1e-12))


def test_a_curve_is_drawn_from_any_losses(tmp_path: Path) -> None:
    for number, curve in enumerate(
        (LossCurve({1: 2.0}), LossCurve({}, {3: 1.0}), LossCurve({1: 2.0, 2: float("nan")}))
    ):
        draw(curve, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(PNG)
    assert smoothed((1.0, 2.0, 6.0)).tolist() == [1.5, 3.0, 4.0]
    assert validation_metric(["train_loss", "valid/loss", "val_loss"]) == "val_loss"
    assert validation_metric(["Validation_Loss"]) == "Validation_Loss"
    assert validation_metric(["train_loss", "val_loss_weight", "interval_loss"]) is None


@pytest.mark.slow
def test_what_the_command_prints_is_there_and_its_next_commands_run(tmp_path: Path) -> None:
    base = tmp_path / "my base"
    base.symlink_to(MODEL)
    fit = ["fit", *configs("sft.yaml", "lora.yaml"), *EMBEDDED, "--model.init_args.model=my base"]
    fit += ["--trainer.default_root_dir=my runs"]
    done = lightning_lora(*fit, "--trainer.val_check_interval=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "my runs/sft/version_0"
    assert {entry.name for entry in tmp_path.iterdir()} == {"my base", "my runs"}
    lines = done.stderr[done.stderr.index("run in ") :].splitlines()[:5]
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    assert lines[0] == (
        f"run in {run.relative_to(tmp_path)}: adapter adapters/last, last checkpoint checkpoints/{checkpoint.name}, "
        "metrics metrics.csv, loss curve loss.png, report report.html"
    )
    assert lines[1].startswith("best val_loss ")
    commands = [shlex.split(line) for line in lines[2:]]
    assert [command[:2] for command in commands] == [
        ["lightning-lora", name] for name in ("generate", "merge", "export")
    ]
    for command in commands[1:]:
        next_one = warm.run(*COMMAND, *command[1:], cwd=tmp_path)
        assert next_one.returncode == 0, next_one.stderr
    assert (run / "merged/model.safetensors").is_file()
    assert (run / "exported/adapter_model.safetensors").is_file()
    # The saved config moves again.
    config = run.relative_to(tmp_path) / "config.yaml"
    again = lightning_lora("fit", f"--config={config}", "--trainer.default_root_dir=new", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "new/sft/version_0/metrics.csv").is_file()


@pytest.mark.slow
def test_an_interrupted_run_of_two_processes_tells_once(tmp_path: Path) -> None:
    fit = ["fit", *configs("sft.yaml", "lora.yaml", "strategy/ddp.yaml"), *EMBEDDED, "--trainer.max_epochs=500"]
    outputs = [tmp_path / "0.txt", tmp_path / "1.txt"]
    processes = [
        warm.Process(*COMMAND, *fit, cwd=tmp_path, env=environment, stdout=output)
        for environment, output in zip(warm.ranks(2), outputs, strict=True)
    ]
    try:
        run = tmp_path / "runs/sft/version_0"
        deadline = time.monotonic() + warm.LIMIT
        while not (run / "adapters/last").is_dir() and time.monotonic() < deadline:
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGINT)
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill_all()
    told = [output.read_text() for output in outputs]
    assert codes[0] == 130, told
    assert [text.count("run in runs/sft/version_0: adapter adapters/last, ") for text in told] == [1, 0]
    assert "last checkpoint checkpoints/stopped.ckpt" in told[0]
    assert (run / "loss.png").read_bytes().startswith(PNG)


def test_where_a_batch_takes_two_steps_losses_stand_at_their_steps(tmp_path: Path) -> None:
    """Lightning counts batches in ``metrics.csv`` then."""
    LossCurve({2: 1.0, 4: 0.5, 6: 0.25}, {6: 0.3}).write(tmp_path / "curve.csv")
    (tmp_path / "metrics.csv").write_text("step,train_loss,val_loss\n0,1.0,\n1,0.5,\n2,0.25,0.3\n")
    found = read_losses(tmp_path)
    assert (found.train, found.validation) == ({2: 1.0, 4: 0.5, 6: 0.25}, {6: 0.3})
