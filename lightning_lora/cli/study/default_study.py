"""The study of one config without a study file: full fine-tuning against two ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_lora.cli.study.arms import resolve
from lightning_lora.cli.study.estimate import Estimate, estimate
from lightning_lora.cli.study.fit_config import fit_config
from lightning_lora.cli.study.matched_size import LORA
from lightning_lora.errors import StudySettingError
from lightning_lora.study.matched.options import has_option, option_of
from lightning_lora.study.matched.record import STUDY, read_study
from lightning_lora.study.matched.spec import StudySpec, spec_of

DEFAULT_RANK = 32
DEFAULT_NAME = "full_against_lora"
LOW = 8
"""The second rank is the first one divided by this."""
FEWEST_STEPS = 20


def default_study(arguments: Sequence[str], hours: float | None, folder: Path) -> tuple[StudySpec, Estimate | None]:
    """The study of the arguments of ``fit``: full fine-tuning, the config's rank on all layers, and an eighth of it.

    Args:
        arguments: Arguments of ``fit``.
        hours: Shortens every run so that the whole study takes about so long; None leaves them as they are.
        folder: The study folder. The length of the runs of a study that has begun there stays as it is.

    Returns:
        The study, and its time if that was estimated on the way.

    Raises:
        ConfigError: If the model takes no ``lora``, or not even a few steps fit into the hours.
    """
    config = fit_config(arguments, "the config")
    if not has_option(config, LORA):
        raise StudySettingError(
            f"{option_of(config, 'model.class_path')} takes no lora, so there is nothing to compare by default: write "
            f"a study file, see docs/understand/study.md."
        )
    high = int(option_of(config, f"{LORA}.rank") or DEFAULT_RANK)
    ranks = [rank for rank in dict.fromkeys((max(1, high // LOW), high))]
    arms: dict[str, Any] = {"full fine-tuning": {"overrides": {LORA: None}}}
    for rank in ranks:
        lora = dict(option_of(config, LORA) or {}) | {"rank": rank, "targets": "all"}
        arms[f"rank {rank}"] = {"overrides": {LORA: lora}}
    spec, _, _ = spec_of({"arms": arms, "primary": f"rank {high}"}, DEFAULT_NAME)
    more = list(arguments)
    found = None
    if hours is not None and (folder / STUDY).is_file():
        more.append(f"--trainer.max_steps={_begun_steps(folder)}")
    elif hours is not None:
        found = _shortened(resolve(spec, (), {}, Path(), more), hours)
        more.append(f"--trainer.max_steps={found.steps}")
    return resolve(spec, (), {}, Path(), more), found


def _begun_steps(folder: Path) -> int:
    record = read_study(folder)
    return int(option_of(record.arms[0].config, "trainer.max_steps", -1))


def _shortened(spec: StudySpec, hours: float) -> Estimate:
    """The time of the study with runs so short that all of it takes so long."""
    found = estimate(spec)
    if found is None:
        raise StudySettingError(
            "--hours needs an estimate of the time of a run, and there is none for this module and data."
        )
    scoring = found.mostly.passes * found.pass_seconds
    share = max(0.0, hours * 3600 - scoring) / (found.total_seconds - scoring)
    steps = int(found.steps * min(1.0, share))
    fewest = min(FEWEST_STEPS, found.steps)
    if steps < fewest:
        needed = found.with_steps(fewest).total_seconds / 3600
        raise StudySettingError(
            f"in {hours:g} hours each of about {found.mostly.runs} runs would take {steps} steps, too few to compare: "
            f"give --hours {needed:.2g} or more, or a smaller model."
        )
    return found.with_steps(steps)
