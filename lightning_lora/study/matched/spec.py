"""The settings of a study: what is compared with what, on how many seeds, and what counts as equal.

A study file names configs of ``fit``, and arms that change single options of it. Here its shape is checked; whether the
options exist is known when the configs are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from lightning_lora.errors import ConfigError, StudySettingError, check_choice, check_count, did_you_mean
from lightning_lora.files.yaml_text import read_yaml
from lightning_lora.study.bank.mode import chosen_mode
from lightning_lora.study.matched import settings as read
from lightning_lora.study.matched.record import UNTRAINED
from lightning_lora.study.statistics.seed_plan import SeedPlan
from lightning_lora.study.statistics.word import BAND, check_band

KEYS = (
    *("name", "configs", "overrides", "baseline", "primary", "arms", "learning_rates", "learning_rate_option"),
    *("seeds", "selection_seeds", "band", "evaluations", "aa", "halving", "batch_penalty"),
    *("arms_per_device", "arms_mode"),
)
ARM_KEYS = ("configs", "overrides", "learning_rates", "matched_rank")
MODES = ("auto", "turns", "rows")
RATE_OPTION = "model.init_args.learning_rate"
_NAME = re.compile(r"[^\W_][\w .,:+/()%-]{0,59}")


@dataclass(frozen=True)
class ArmSpec:
    """One way to train.

    Args:
        configs: Config files of ``fit``, in addition to those of the study.
        overrides: Dotted option to value, in addition to those of the study.
        learning_rates: Rates that the sweep starts with, in terms of full fine-tuning; empty for ``auto``, a third of
            the config's rate, the rate and three times the rate.
        matched_rank: Name of an arm whose number of adapter parameters decides the rank of this one; "" if none does.
        config: All options of ``fit`` after configs and overrides; filled in by the command line.
    """

    name: str
    configs: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = ()
    matched_rank: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StudySpec:
    """A study.

    Args:
        name: Its name, which tells it from other studies in one database.
        arms: At least two.
        baseline: Name of the arm that others are compared with.
        primary: Name of the arm of the one comparison whose level is not corrected for the number of comparisons.
        seeds: ``3``, a list of fresh seeds, or ``"auto"`` for 3, 5, 8 as needed.
        selection_seeds: Seeds that learning rates are chosen with; never used for a verdict.
        band: Nats that count as equal.
        learning_rate_option: Dotted option that takes the learning rate.
        evaluations: Evaluate held-out rows on a log-spaced grid, each step at most this many times the one before;
            None: the validations of a run are its evaluations.
        aa: Whether the baseline is run again with other seeds, as the noise floor.
        halving: Whether selection runs that are far behind after a third of their steps are given up.
        batch_penalty: ``lora`` and ``full``, each with the names of its arms at a ``small`` and a ``large`` batch, for
            a difference of differences; empty if none is asked for.
        arms_per_device: Number of adapter runs that a worker trains side by side on one base; see `ArmBank`.
        arms_mode: Whether these take turns, as separate runs bit for bit, or share batches: ``turns`` or ``rows``;
            ``auto`` chooses before the study starts.
        mode_reason: Why this mode was chosen; "" if it was given.
    """

    name: str
    arms: tuple[ArmSpec, ...]
    baseline: str
    primary: str
    seeds: int | tuple[int, ...] | Literal["auto"] = 3
    selection_seeds: tuple[int, ...] = (0,)
    band: float = BAND
    learning_rate_option: str = RATE_OPTION
    evaluations: float | None = None
    aa: bool = False
    halving: bool = False
    batch_penalty: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    arms_per_device: int = 1
    arms_mode: str = "auto"
    mode_reason: str = ""

    def __post_init__(self) -> None:
        check_band(self.band)
        names = [arm.name for arm in self.arms]
        if len(names) < 2:
            raise StudySettingError(f"a study compares at least two arms, got {names or 'none'}: name them under arms.")
        matched = [(f"matched_rank of {arm.name!r}", arm.matched_rank) for arm in self.arms if arm.matched_rank]
        batches = [
            (f"batch_penalty, {kind}, {batch}", name)
            for kind, arms in self.batch_penalty.items()
            for batch, name in arms.items()
        ]
        for key, name in (("baseline", self.baseline), ("primary", self.primary), *matched, *batches):
            if name not in names:
                raise StudySettingError(f"{key} {name!r} is no arm{did_you_mean(name, names)}")
        if own := next((arm.name for arm in self.arms if arm.matched_rank == arm.name), None):
            raise StudySettingError(
                f"matched_rank of {own!r} names the arm itself: name the one it is to be as large as."
            )
        if len({name for _, name in batches}) < len(batches):
            raise StudySettingError(f"batch_penalty compares four arms, got {', '.join(name for _, name in batches)}.")
        if self.primary == self.baseline:
            raise StudySettingError(
                f"primary names the arm to compare with the baseline, and {self.primary!r} is both."
            )
        if not self.selection_seeds:
            raise StudySettingError("selection_seeds is empty: learning rates are chosen with at least one seed.")
        if isinstance(self.seeds, tuple) and (both := {*self.seeds} & {*self.selection_seeds}):
            raise StudySettingError(
                f"seeds and selection_seeds share {sorted(both)}: a seed that chose a learning rate flatters it, so "
                f"verdicts need others."
            )
        _ = self.plan  # a wrong number is refused now

    @property
    def plan(self) -> SeedPlan:
        """After how many seeds verdicts are looked at, and at which level."""
        return SeedPlan.of(len(self.seeds) if isinstance(self.seeds, tuple) else self.seeds)

    def verdict_seeds(self, count: int) -> tuple[int, ...]:
        """The first ``count`` fresh seeds."""
        if isinstance(self.seeds, tuple):
            return self.seeds[:count]
        fresh = max(self.selection_seeds) + 1
        return tuple(range(fresh, fresh + count))

    @property
    def aa_seeds(self) -> tuple[int, ...]:
        """The seeds of the baseline's second runs: as many as the first look has, and used by no other run."""
        count = self.plan.looks[0] if self.aa else 0
        fresh = max(*self.selection_seeds, *self.verdict_seeds(self.plan.looks[-1])) + 1
        return tuple(range(fresh, fresh + count))

    def with_configs(self, configs: Mapping[str, Mapping[str, Any]]) -> StudySpec:
        """The same study, whose arms have these configs."""
        return replace(self, arms=tuple(replace(arm, config=configs[arm.name]) for arm in self.arms))

    def with_mode(self, reasons: Iterable[str], tokens: int | None, is_cpu: bool) -> StudySpec:
        """The same study, with a mode for arms side by side if it is to be chosen; arguments as in `chosen_mode`."""
        if self.arms_mode != "auto" or self.arms_per_device == 1:
            return self
        mode, reason = chosen_mode(reasons, tokens, is_cpu)
        return replace(self, arms_mode=mode, mode_reason=reason)

    def arm(self, name: str) -> ArmSpec:
        """The arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)


def read_spec(path: str | Path) -> tuple[StudySpec, tuple[str, ...], dict[str, Any]]:
    """Read a study file.

    Returns:
        The study, whose arms have no ``config`` yet; the configs of all arms; and the overrides of all arms.

    Raises:
        ConfigError: If it cannot be read, or a setting is unknown, missing or wrong.
    """
    path = Path(path)
    try:
        given = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StudySettingError(f"the study file {path} cannot be read: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StudySettingError(f"the study file {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise StudySettingError(f"the study file {path} must hold settings such as configs and arms.")
    try:
        return spec_of(given, path.stem)
    except ConfigError as error:
        raise StudySettingError(f"{path}: {error}") from error


def spec_of(given: Mapping[str, Any], name: str) -> tuple[StudySpec, tuple[str, ...], dict[str, Any]]:
    """The study of settings that are already read; see `read_spec`."""
    read.check_keys(given, KEYS, "the study")
    if "arms" not in given:
        raise StudySettingError("there are no arms: name at least two ways to train under arms.")
    arms = read.mapping(given["arms"], "arms")
    rates = read.rates(given.get("learning_rates", "auto"), "learning_rates")
    made = tuple(_arm(str(arm), settings, rates) for arm, settings in arms.items())
    names = [arm.name for arm in made]
    baseline = str(given.get("baseline", names[0] if names else ""))
    others = [arm for arm in names if arm != baseline]
    per_device, mode = given.get("arms_per_device", 1), given.get("arms_mode", "auto")
    check_count("arms_per_device", per_device, StudySettingError)
    check_choice("arms_mode", mode, MODES, StudySettingError)
    spec = StudySpec(
        name=read.study_name(given.get("name", name)),
        arms=made,
        baseline=baseline,
        primary=str(given.get("primary", others[-1] if others else baseline)),
        seeds=read.seeds(given.get("seeds", 3)),
        selection_seeds=read.seed_list(given.get("selection_seeds", [0]), "selection_seeds"),
        band=read.number(given.get("band", BAND), "band"),
        learning_rate_option=str(given.get("learning_rate_option", RATE_OPTION)),
        evaluations=read.evaluation_factor(given.get("evaluations")),
        aa=read.flag(given, "aa"),
        halving=read.flag(given, "halving"),
        batch_penalty=read.four_arms(given.get("batch_penalty")),
        arms_per_device=per_device,
        arms_mode=mode,
    )
    configs = read.texts(given.get("configs") or [], "configs")
    return spec, configs, read.overrides(given.get("overrides"), "overrides")


def _arm(name: str, settings: Any, rates: tuple[float, ...]) -> ArmSpec:
    where = f"arm {name!r}"
    if not _NAME.fullmatch(name) or name == UNTRAINED or name.endswith("."):
        raise StudySettingError(
            f"{where}: a name has 1 to 60 letters, digits, spaces or .,:+/()%- and begins with a letter."
        )
    settings = read.mapping(settings or {}, where)
    read.check_keys(settings, ARM_KEYS, where)
    if "learning_rates" in settings:
        rates = read.rates(settings["learning_rates"], f"{where}, learning_rates")
    overrides = read.overrides(settings.get("overrides"), f"{where}, overrides")
    configs = read.texts(settings.get("configs") or [], f"{where}, configs")
    return ArmSpec(name, configs, overrides, rates, str(settings.get("matched_rank") or ""))
