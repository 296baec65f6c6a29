"""``lightning-lora recipes``: the configs that come with the package, listed and copied."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from lightning_lora.errors import CommandError, did_you_mean

_PACKAGE = Path(__file__).parents[2]


def recipes_folder() -> Path:
    """Where the configs are: in an installed package, or at the top of the repository."""
    installed = _PACKAGE / "assets" / "cli_configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "cli_configs"


def recipes() -> dict[str, str]:
    """What each config is for, from its first line, by its path in `recipes_folder`."""
    folder = recipes_folder()
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".sh"))
    return {path.relative_to(folder).as_posix(): _purpose(path) for path in files}


def copy_recipes(names: Sequence[str], to: Path) -> list[Path]:
    """Copy configs, all of them if none is named, to be changed.

    Args:
        names: Paths as `recipes` gives them.
        to: The folder to write into; made if it is missing.

    Returns:
        The files written.

    Raises:
        ConfigError: If there is no such config, or a file of that name is there already: nothing is written then.
    """
    known = recipes()
    for name in names:
        if name not in known:
            raise CommandError(
                f"there is no recipe {name!r}{did_you_mean(name, known)} See: lightning-lora recipes list"
            )
    targets = {name: to / name for name in names or known}
    for target in targets.values():
        if target.exists():
            raise CommandError(f"{target} is there already, and may have been changed: give another folder by --to.")
    for name, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(recipes_folder() / name, target)
    return list(targets.values())


def _purpose(path: Path) -> str:
    lines = path.read_text().splitlines()
    line = next(line for line in lines if line.startswith("# "))
    return line.removeprefix("# ").removesuffix(":")
