"""Checkpoint plugins, profilers, loggers and layer synchronisation with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins import (
    AsyncCheckpointIO,
    TorchCheckpointIO,
    TorchSyncBatchNorm,
    TransformerEnginePrecision,
)
from lightning.pytorch.profilers import AdvancedProfiler, PassThroughProfiler, PyTorchProfiler, SimpleProfiler
from torch import nn

from lightning_lora import ConfigError, LoRAConfig, LoRAMixin, inject_lora, lora_layers, lora_state_dict
from tests.integration.lightning import adapted_runs
from tests.integration.lightning.adapted_runs import WAYS
from tests.support import toys

pytestmark = toys.expected_warnings
ways = pytest.mark.parametrize("way", WAYS)


@ways
@pytest.mark.parametrize("make", [TorchCheckpointIO, AsyncCheckpointIO])
def test_a_checkpoint_plugin_writes_adapters_only_and_they_load(way: str, make: Any, tmp_path: Path) -> None:
    trainer = adapted_runs.fit(way, tmp_path, plugins=[make()])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer.strategy.checkpoint_io.teardown()
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert all("lora_" in name for name in kept["state_dict"])
    module, callbacks = adapted_runs.student(way)
    reader = toys.trainer(tmp_path, callbacks=callbacks, plugins=[make()])
    reader.validate(module, ckpt_path=tmp_path / "a.ckpt", verbose=False, weights_only=True)
    assert toys.same(lora_state_dict(module), lora_state_dict(trainer.lightning_module))


@ways
@pytest.mark.parametrize("make", [PassThroughProfiler, SimpleProfiler, AdvancedProfiler, PyTorchProfiler])
@pytest.mark.filterwarnings("ignore:.*[Pp]rofiler")
def test_a_profiler_looks_on(way: str, make: Any, tmp_path: Path) -> None:
    adapted_runs.fit(way, tmp_path, profiler=make() if make is PassThroughProfiler else make(tmp_path, "profile"))


class Saved(adapted_runs.Student):
    """Saves its hyperparameters, LoRA settings among them."""

    def __init__(self, lora: Any = None, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()


class SavedAdapted(LoRAMixin, adapted_runs.Student):
    """The same with the mixin."""

    def __init__(self, lora: Any = None, width: int = 8) -> None:
        super().__init__(lora=lora)
        self.save_hyperparameters()


class Recorder(Logger):
    """Keeps all that a logger is given."""

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> int:
        return 0

    def __init__(self) -> None:
        super().__init__()
        self.hyperparameters: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.hyperparameters |= dict(params)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics |= metrics


@ways
@pytest.mark.parametrize("make", [lambda folder: Recorder(), CSVLogger])
def test_a_logger_gets_metrics_and_plain_hyperparameters(way: str, make: Any, tmp_path: Path) -> None:
    kind = SavedAdapted if way == "mixin" else Saved
    logger = make(tmp_path)
    adapted_runs.fit(way, tmp_path, module=kind(adapted_runs.CONFIG), logger=logger, log_every_n_steps=1)
    if isinstance(logger, Recorder):
        assert {"train_loss", "val_loss"} <= logger.metrics.keys()
        # The callback makes the module a LoRAMixin, so that both have plain types.
        assert logger.hyperparameters == {"lora": adapted_runs.CONFIG.to_dict(), "width": 8}
    else:
        assert "train_loss" in (Path(logger.log_dir) / "metrics.csv").read_text()


def test_synchronised_batch_norm_leaves_adapters_in_their_place() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    inject_lora(module, LoRAConfig(rank=2))
    layers = lora_layers(module)
    converted = TorchSyncBatchNorm().apply(module)  # pyright: ignore[reportArgumentType]
    assert lora_layers(converted) == layers
    assert isinstance(converted[1], nn.SyncBatchNorm)  # pyright: ignore[reportIndexIssue]
    assert not converted[1].weight.requires_grad  # pyright: ignore[reportIndexIssue]


@ways
@pytest.mark.parametrize("replace", [None, True])
def test_transformer_engine_would_replace_adapted_layers_and_is_refused(
    way: str, replace: bool | None, tmp_path: Path
) -> None:
    # Its package runs on GPUs only and is not installed: this is the plugin without its constructor.
    plugin = TransformerEnginePrecision.__new__(TransformerEnginePrecision)
    plugin.weights_dtype, plugin.replace_layers = torch.float32, replace
    plugin.module_init_context = plugin.tensor_init_context
    with pytest.raises(ConfigError, match=r"TransformerEnginePrecision replaces every .*replace_layers=False"):
        adapted_runs.fit(way, tmp_path, plugins=[plugin])
