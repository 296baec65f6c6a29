"""What the user named: a run folder, a checkpoint, an adapter folder, or the folder of a whole model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_lora.checkpoints.shards import is_folder_of_shards
from lightning_lora.cli.run_source import find_source
from lightning_lora.errors import AdapterFileError, GenerateError, RunSourceError, check_choice
from lightning_lora.files.adapter.peft_format import CONFIG_FILE
from lightning_lora.files.lightning_checkpoint import read_checkpoint

WHICH = ("last", "best")
_KINDS = "a run folder, a checkpoint (.ckpt), an adapter folder, or the folder of a Hugging Face model"


@dataclass(frozen=True)
class Source:
    """A place with a trained model.

    Args:
        path: The checkpoint file, the adapter folder or the model folder.
        kind: ``"checkpoint"``, ``"adapter"`` or ``"model"``.
    """

    path: Path
    kind: str


def find(named: Path, which: str | None = None) -> Source:
    """Find the model to use: ``named`` itself, or the last or best one in a run folder.

    Args:
        named: A run folder, a checkpoint, an adapter folder or a model folder.
        which: ``"last"`` or ``"best"`` of a run folder. None takes the last one.

    Raises:
        ConfigError: If ``which`` is unknown, or given for something that is no run folder.
        AdapterFileError: If there is nothing to generate with.
    """
    if which is not None:
        check_choice("--which", which, WHICH)
    if not named.exists():
        raise RunSourceError(f"{named} does not exist: give {_KINDS}.")
    source = _as_it_is(named)
    if source is not None and which is not None:
        raise GenerateError(f"--which chooses from a run folder, and {named} is no run folder: leave it out.")
    if source is None:
        path = _best(named) if which == "best" else _last(named)
        source = Source(path, "adapter" if path.is_dir() else "checkpoint")
    return source


def _as_it_is(named: Path) -> Source | None:
    if named.is_file():
        return Source(named, "checkpoint")
    if is_folder_of_shards(named):
        raise RunSourceError(
            f"{named} is a checkpoint in shards: make one file of it with `lightning-lora consolidate {named} OUT.ckpt`"
            " and give that."
        )
    if (named / CONFIG_FILE).is_file():
        return Source(named, "adapter")
    return Source(named, "model") if (named / "config.json").is_file() else None


def _last(run: Path) -> Path:
    sharded = sorted(path for path in run.rglob("*.ckpt") if is_folder_of_shards(path))
    if sharded:
        _as_it_is(sharded[-1])  # raises
    try:
        return find_source(run)
    except AdapterFileError as error:
        if any(run.rglob("*.ckpt")):
            raise
        raise RunSourceError(f"{run} holds no checkpoint, adapter or model: give {_KINDS}.") from error


def _best(run: Path) -> Path:
    """The best adapter of a run, else the checkpoint that its ``ModelCheckpoint`` has found the best."""
    folders = [folder for folder in run.rglob("adapters/best") if (folder / CONFIG_FILE).is_file()]
    if folders:
        return max(folders, key=lambda folder: (folder / CONFIG_FILE).stat().st_mtime)
    last = _last(run)
    states = read_checkpoint(last).get("callbacks", {}) if last.is_file() else {}
    for state in states.values():
        if state.get("monitor") is not None and state.get("best_model_path"):
            best = Path(state["best_model_path"])
            # A run folder may have been moved since.
            for path in (last.parent / best.name, best):
                if path.is_file():
                    return path
    raise RunSourceError(
        f"{run} does not know its best model: it holds no adapters/best, and no checkpoint that a ModelCheckpoint with "
        "a monitor has kept. Give one to the run (AdapterCheckpoint or ModelCheckpoint with monitor: val_loss), or "
        "leave out --which best."
    )
