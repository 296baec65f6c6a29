"""What a command works on if it is given a run folder: the latest adapter or checkpoint in it."""

from __future__ import annotations

from pathlib import Path

from lightning_lora.errors import CommandError, RunSourceError
from lightning_lora.files.adapter.folder import read_adapter_folder
from lightning_lora.files.adapter.peft_format import CONFIG_FILE
from lightning_lora.files.lightning_checkpoint import read_checkpoint


def find_source(run: Path) -> Path:
    """The checkpoint or adapter folder of a run: ``run`` itself, or the latest one in a run folder.

    Raises:
        AdapterFileError: If there is nothing at ``run``, or a run folder holds neither.
    """
    if run.is_file() or (run / CONFIG_FILE).is_file():
        return run
    if not run.exists():
        raise RunSourceError(f"there is no {run}: give a run folder, a checkpoint or an adapter folder.")
    # The latest by optimizer step, as file times change with clocks and copies; at the same step the checkpoint.
    steps = {folder: _adapter_step(folder) for folder in run.rglob("adapters/last") if (folder / CONFIG_FILE).is_file()}
    steps |= {file: read_checkpoint(file)["global_step"] for file in sorted(run.rglob("*.ckpt"))}
    if not steps:
        place = f"{run} is a model, not a run: it" if (run / "config.json").is_file() else f"{run}"
        raise RunSourceError(
            f"{place} holds no checkpoint (*.ckpt) and no adapter folder: give a run folder or a file."
        )
    return max(steps, key=lambda source: (steps[source], source.is_file()))


def check_merge_order(base: Path, adapter: Path) -> None:
    """Check that the base and the adapter of a merge are not exchanged.

    Raises:
        ConfigError: If they are.
    """
    if (base / CONFIG_FILE).is_file() and not (adapter / CONFIG_FILE).is_file() and (adapter / "config.json").is_file():
        raise CommandError(f"{base} is an adapter and {adapter} a model: lightning-lora merge BASE ADAPTER OUT.")


def _adapter_step(folder: Path) -> int:
    return read_adapter_folder(folder).manifest.summary.get("step", -1)
