"""A mistake for every kind of error, small enough to be made while the page of errors is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from packaging.requirements import Requirement
from torch import nn
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig, errors, inject_lora, load_adapter, merge_lora, save_adapter
from lightning_lora.batch.division import divide_rows
from lightning_lora.callbacks import BatchSizeMonitor, FiniteGradients, LoRAProgressBar, RankGrowth
from lightning_lora.cli.embedded import MODEL
from lightning_lora.cli.generate.decoding import Sampling
from lightning_lora.cli.mistakes.config_files import check_config_files
from lightning_lora.cli.run_source import find_source
from lightning_lora.data import SFTDataModule
from lightning_lora.data.bad_rows import RowError
from lightning_lora.data.chat.template import Template
from lightning_lora.data.formats.values import read_text
from lightning_lora.data.sources import find_sources
from lightning_lora.errors import LoRAError, check_choice
from lightning_lora.files.atomic import atomic_folder
from lightning_lora.files.folder_lock import take_lock
from lightning_lora.files.lightning_checkpoint import read_checkpoint
from lightning_lora.files.safetensors_header import read_header
from lightning_lora.lora.shards import check_not_sharded
from lightning_lora.memory.failures import TraceError, explained
from lightning_lora.memory.strategies import divide_memory
from lightning_lora.mixin.optim import check_learning_rate, check_optimizers
from lightning_lora.planning.devices import parse_bytes
from lightning_lora.study.batch_probe import BatchProbe
from lightning_lora.study.matched.spec import read_spec
from lightning_lora.study.report.write import write_report
from lightning_lora.study.statistics.word import check_band
from lightning_lora.study.tasks.settings import TaskSettings
from lightning_lora.tasks.optimizer import check_optimizer
from lightning_lora.tasks.quantised_loading import check_quantization
from lightning_lora.tasks.rl.functional.preference_loss import check_preference_settings
from lightning_lora.tasks.rl.rewards.named import NamedReward
from lightning_lora.tasks.rl.rewards.pool import RewardPool
from lightning_lora.tasks.rl.sampling.samples import SamplingSettings
from lightning_lora.tasks.rl.sampling.vllm import VLLMSampler
from lightning_lora.versions import check_versions


def _net(seed: int = 0, layers: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))


def _adapted(**settings: object) -> nn.Module:
    net = _net()
    inject_lora(net, LoRAConfig(rank=2, **settings))  # pyright: ignore[reportArgumentType]
    return net


def _merged_twice() -> None:
    net = _adapted()
    merge_lora(net)
    merge_lora(net)


def _tied() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[0].weight = net[1].weight
    inject_lora(net, LoRAConfig(rank=2))


def _other_base() -> None:
    save_adapter(_adapted(), "adapter")
    load_adapter(_net(seed=1), "adapter")


def _written(name: str, text: str) -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def _place_taken() -> None:
    Path("notes").mkdir()
    _written("notes/today.txt", "mine")
    with atomic_folder("notes", replaces="adapter_config.json"):
        raise AssertionError


def _rows(text: str, **settings: int) -> None:
    SFTDataModule(_written("rows.jsonl", text), tokenizer=str(MODEL), **settings).setup()  # pyright: ignore


class _Exploding(BoringModel):
    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).sum() * float("nan")


def _fit(module: LightningModule, *callbacks: Callback) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **quiet,  # pyright: ignore
    )
    trainer.fit(module, DataLoader(torch.ones(2, 32)))  # pyright: ignore[reportArgumentType]


def _no_folder() -> None:
    take_lock(Path(_written("runs", "a file")) / "sft" / ".run.lock", Path("runs/sft"))


def _flattened() -> None:
    net = _net()
    net.get_submodule("0").register_parameter("weight", type("FlatParameter", (nn.Parameter,), {})(torch.ones(4, 4)))
    check_not_sharded(net)


def _fails(prompts: list[str], completions: list[str]) -> list[float]:
    return [float("nan")] * len(prompts)


def _not_traced() -> None:
    with explained(_net(), "a training step", []):
        raise ValueError("the values of a tensor decide how it goes on")


EXAMPLES: dict[type[LoRAError], Callable[[], object]] = {
    errors.ConfigError: lambda: check_choice("scaling", "rsLoRA", ("standard", "rslora")),
    errors.LoRASettingError: lambda: LoRAConfig(rank=0),
    errors.AdapterStateError: _merged_twice,
    errors.LayerError: _tied,
    errors.RankChangeError: lambda: RankGrowth(threshold=2.0),
    errors.TargetNotFoundError: lambda: _adapted(targets=["q_prj"]),
    errors.AdapterFileError: lambda: load_adapter(_net(), "adapter"),
    errors.DamagedFileError: lambda: read_header(_written("adapter_model.safetensors", "cut")),
    errors.AdapterFolderError: lambda: load_adapter(_net(), "nowhere"),
    errors.CheckpointFileError: lambda: read_checkpoint(Path(_written("last.ckpt", "not a checkpoint"))),
    errors.OutputPlaceError: _place_taken,
    errors.RunSourceError: lambda: find_source(Path("runs/sft")),
    errors.BaseMismatchError: _other_base,
    errors.DataError: lambda: _rows('{"question": "Who?", "answer": "It"}\n', max_length=2),
    errors.ChatTemplateError: lambda: Template("{% for message in messages %}"),
    errors.TokenizerError: lambda: SFTDataModule(_written("rows.jsonl", "{}")).setup(),
    errors.DataSettingError: lambda: SFTDataModule("rows.jsonl", batch_size=0),
    errors.DataFileError: lambda: find_sources(["./rows.jsonl"], "train"),
    errors.ResultFileError: lambda: write_report(Path(".")),
    RowError: lambda: read_text({"answer": 5}, "answer", "rows.jsonl, row 0 (line 1)"),
    errors.GuardError: lambda: check_optimizers(_net().requires_grad_(False), []),
    errors.AccumulationError: lambda: divide_rows(30, 1, 8),
    errors.MeasurementError: lambda: BatchSizeMonitor(every_n_steps=0),
    errors.CallbackSettingError: lambda: LoRAProgressBar(every_n_steps=0),
    errors.OptimizerSettingError: lambda: check_learning_rate(0),
    errors.StrategyError: lambda: divide_memory(None, "ddp2", 2),  # pyright: ignore[reportArgumentType]
    errors.QuantisationError: lambda: check_quantization("nf5", LoRAConfig(), None),
    errors.TaskSettingError: lambda: check_optimizer(1e-4, -1.0, 0, "constant"),
    errors.GradientError: lambda: _fit(_Exploding(), FiniteGradients()),
    errors.RunFolderError: _no_folder,
    errors.AlreadyShardedError: _flattened,
    TraceError: _not_traced,
    errors.RewardError: lambda: RewardPool(_fails, workers=0)(["Why?"], ["So."], {}),
    errors.RewardSettingError: lambda: NamedReward("my_rewards.short"),
    errors.SamplerError: lambda: VLLMSampler("http://127.0.0.1:9", "adapters", timeout=1.0)._post("/v1/x", {}),
    errors.SamplingSettingError: lambda: SamplingSettings(temperature=-1.0),
    errors.PolicySettingError: lambda: check_preference_settings("sigmoid", 0.0, 0.0),
    errors.PlanError: lambda: parse_bytes("24"),
    errors.StudySettingError: lambda: read_spec(_written("study.yaml", "amrs: {}")),
    errors.StatisticsError: lambda: check_band(0.0),
    errors.ProbeError: lambda: BatchProbe(at=-1),
    errors.BenchmarkError: lambda: TaskSettings(tasks=()),
    errors.CommandError: lambda: check_config_files(["--config", "sft.yml"]),
    errors.GenerateError: lambda: Sampling(temperature=0.0, top_p=0.5),
    errors.VersionError: lambda: check_versions([Requirement("torch>=2.10")], lambda name: "2.9.1"),
}
"""A call that raises each kind of error, in an empty folder."""
