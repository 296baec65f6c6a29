"""Paths that are no checkpoints: an adapter folder, a model, a run folder, each named with the way to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from lightning_lora.checkpoints.shards import is_folder_of_shards
from lightning_lora.errors import CheckpointFileError, first_five
from lightning_lora.files.adapter.peft_format import CONFIG_FILE, TENSOR_FILE
from lightning_lora.files.lightning_checkpoint import refuse_packed

_READ_SHARDS = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)
_SHARDS = (
    "is a folder of shards, which is not read here: add the callback CheckpointGuard, or make it one file with "
    "`lightning-lora consolidate {folder} OUT`."
)


def refuse_other_files(path: str | Path, reads_shards: bool = True) -> None:
    """Raise `AdapterFileError` if ``path`` is on this machine and surely no checkpoint of Lightning.

    Args:
        path: What was given as ``ckpt_path``.
        reads_shards: Whether what reads it takes a folder of shards.
    """
    path = Path(path)
    if path.name == TENSOR_FILE and (path.parent / CONFIG_FILE).is_file():
        path = path.parent
    if path.suffix == ".safetensors" and path.is_file():
        raise CheckpointFileError(
            f"{path} holds weights only and is not a checkpoint of Lightning. Give the folder of a model as the model "
            "itself, with no ckpt_path."
        )
    if path.is_dir() and (problem := _problem_with_folder(path, reads_shards)):
        raise CheckpointFileError(f"{path} {problem}")


def explain_ckpt_path(trainer: Trainer) -> None:
    """Let the strategy of ``trainer`` check a path before it reads a checkpoint there, and what it has read."""
    strategy = trainer.strategy
    if not isinstance(strategy.load_checkpoint, _ExplainedLoading):
        strategy.load_checkpoint = _ExplainedLoading(strategy)


class _ExplainedLoading:
    """Stands in for the method of one strategy; a class, so that a strategy can still be pickled."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy

    def __call__(self, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        reader = getattr(self._strategy.checkpoint_io, "checkpoint_io", self._strategy.checkpoint_io)
        if isinstance(reader, TorchCheckpointIO):  # a CheckpointIO of the user may take any folder
            reads_shards = isinstance(self._strategy, _READ_SHARDS) or type(reader) is not TorchCheckpointIO
            refuse_other_files(checkpoint_path, reads_shards)
        # Ours says so itself, and may take another checkpoint instead.
        if type(reader) is TorchCheckpointIO:
            refuse_packed(Path(checkpoint_path))
        load: Any = type(self._strategy).load_checkpoint
        checkpoint = load(self._strategy, checkpoint_path, *args, **kwargs)
        # Lightning asks for this key next.
        if "pytorch-lightning_version" not in checkpoint:
            raise CheckpointFileError(
                f"{checkpoint_path} is not a checkpoint of Lightning: it holds {first_five(map(str, checkpoint))}."
            )
        return checkpoint


def _problem_with_folder(folder: Path, reads_shards: bool) -> str | None:
    if (folder / CONFIG_FILE).is_file():
        return f"is an adapter folder, which holds weights only. {_ways(folder)}"
    if (folder / "config.json").is_file():
        return "is the folder of a Hugging Face model, no checkpoint: give it as the model itself, with no ckpt_path."
    if is_folder_of_shards(folder):
        return None if reads_shards else _SHARDS.format(folder=folder)
    if (folder / "checkpoint").is_dir():  # DeepSpeed's
        return None
    if inside := sorted({*folder.glob("*.ckpt"), *folder.glob("checkpoints/*.ckpt")}, key=lambda p: p.stat().st_mtime):
        return f"is a folder: give one of the checkpoints in it; the latest is {inside[-1]}."
    if adapters := [config.parent for depth in ("*", "*/*") for config in folder.glob(f"{depth}/{CONFIG_FILE}")]:
        latest = max(adapters, key=lambda p: p.stat().st_mtime)
        return f"is a folder with adapters and no checkpoint; the latest is {latest}. {_ways(latest)}"
    return "is a folder and holds no checkpoint (*.ckpt)."


def _ways(adapter: Path) -> str:
    return (
        "To continue a run, give one of its checkpoints (*.ckpt). To start from the adapter or to evaluate it, call "
        f"load_adapter(module, {str(adapter)!r}) and give no ckpt_path, or run "
        f"`lightning-lora merge BASE {adapter} OUT` and take OUT as the model."
    )
