"""What to adapt and how: one frozen, validated set of LoRA settings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lightning_lora.errors import ConfigError, closest

ROLE_TARGETS = ("all", "attention", "mlp", "experts")
SCALINGS = ("standard", "rslora")
INITS = ("default", "gaussian")
TIED = ("refuse", "untie", "both")
ADAPTER_DTYPES = ("float32", "bfloat16", "float64")


@dataclass(frozen=True)
class LoRAConfig:
    r"""Settings of a low-rank update ``W + scale * B A`` on the chosen layers; the base stays frozen.

    A *name pattern* matches a module's dotted name when it is equal, a dotted suffix (``q_proj``), or a glob
    (``*.mlp.*``). In mappings the first pattern that matches wins.

    Args:
        rank: Inner dimension of every update, at least 1. A smaller layer is adapted at its own full rank, with a
            warning.
        alpha: Numerator of the scale. Kept at 32 for every rank, early learning does not depend on the rank.
        targets: ``"all"`` (every weight matrix of attention, MLP and MoE experts), ``"attention"``, ``"mlp"``,
            ``"experts"``, or a list of name patterns.
        exclude: Name patterns of layers to leave alone.
        rank_pattern: Name pattern to rank, for layers that differ.
        alpha_pattern: Name pattern to alpha, for layers that differ.
        dropout: Probability of dropping an input of the update while training, in ``[0, 1)``.
        scaling: ``"standard"`` (alpha / rank) or ``"rslora"`` (alpha / sqrt(rank)).
        init: How A starts; B starts at zero. ``"default"``: uniform within 1/sqrt(d_in), whatever the rank.
            ``"gaussian"``: normal with standard deviation 1/rank.
        lr_multiplier: Adapters learn at this many times the full fine-tuning learning rate.
        adapt_head: Also adapt the output head.
        adapt_embeddings: Also adapt the embeddings.
        trainable: Name patterns of modules trained in full beside the adapters, such as a classification head.
        adapter_dtype: Type of A and B: ``"float32"``, ``"bfloat16"`` or ``"float64"``. None: float32 when the base is
            lower, else the base's.
        share_expert_factors: In layers of fused experts, let all experts share the factor that touches the hidden
            dimension (A on the way in, B on the way out); each then has the whole rank. Otherwise every expert has
            factors of its own, of rank / active experts and at least 1.
        tied_weights: What to do where a weight to adapt is shared with another layer, as an output head's with the
            embedding. ``"refuse"`` raises an error; ``"untie"`` gives each adapted layer a weight of its own;
            ``"both"`` adapts the shared weight, so one update serves all layers that share it.

    Raises:
        ConfigError: If a value has the wrong type or lies outside its range.

    References:
        Hu et al., *LoRA*, ICLR 2022, https://arxiv.org/abs/2106.09685;
        Schulman et al., *LoRA Without Regret*, 2025, https://thinkingmachines.ai/blog/lora/ (defaults);
        Kalajdzievski, *rsLoRA*, 2023, https://arxiv.org/abs/2312.03732.
    """

    rank: int = 32
    alpha: float = 32.0
    targets: str | tuple[str, ...] | list[str] = "all"
    exclude: tuple[str, ...] | list[str] = ()
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    scaling: str = "standard"
    init: str = "default"
    lr_multiplier: float = 10.0
    adapt_head: bool = False
    adapt_embeddings: bool = False
    trainable: tuple[str, ...] | list[str] = ()
    adapter_dtype: str | None = None
    share_expert_factors: bool = False
    tied_weights: str = "refuse"

    def __post_init__(self) -> None:
        _check_rank("rank", self.rank)
        _check_positive("alpha", self.alpha)
        _check_positive("lr_multiplier", self.lr_multiplier)
        _check_number("dropout", self.dropout)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout!r}.")
        _check_choice("scaling", self.scaling, SCALINGS)
        _check_choice("init", self.init, INITS)
        _check_choice("tied_weights", self.tied_weights, TIED)
        if self.adapter_dtype is not None:
            # torch.dtype prints as "torch.float32"; only its name is kept, so that a config stays plain data.
            object.__setattr__(self, "adapter_dtype", str(self.adapter_dtype).removeprefix("torch."))
            if self.adapter_dtype == "float16":
                raise ConfigError(
                    "adapters cannot be trained in float16: AdamW's eps of 1e-12 is zero there, and so are most of its "
                    "second moments. Leave adapter_dtype out (float32 beside a float16 base), or use bfloat16."
                )
            _check_choice("adapter_dtype", self.adapter_dtype, ADAPTER_DTYPES)
        for name in ("adapt_head", "adapt_embeddings", "share_expert_factors"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}.")
        self._check_targets()
        for name in ("exclude", "trainable"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_positive)):
            object.__setattr__(self, name, _pattern_values(name, getattr(self, name), check))

    def _check_targets(self) -> None:
        if isinstance(self.targets, str):
            if self.targets not in ROLE_TARGETS:
                raise ConfigError(
                    f"targets must be one of {', '.join(ROLE_TARGETS)} or a list of name patterns, got "
                    f"{self.targets!r}{closest(self.targets, ROLE_TARGETS)} For a single pattern write "
                    f"[{self.targets!r}]."
                )
            return
        patterns = _patterns("targets", self.targets)
        if not patterns:
            raise ConfigError("targets is an empty list: name at least one pattern, or use 'all'.")
        object.__setattr__(self, "targets", patterns)

    def scale(self, rank: int, alpha: float) -> float:
        """The factor of ``B A`` for a layer of this rank and alpha (dimensionless)."""
        return alpha / rank if self.scaling == "standard" else alpha / math.sqrt(rank)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain types, for YAML, JSON and checkpoints."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any] | LoRAConfig) -> LoRAConfig:
        """Settings from a mapping of field names; a config is returned as it is.

        Raises:
            ConfigError: If a name is not a field, or a value is refused.
        """
        if isinstance(settings, LoRAConfig):
            return settings
        if not isinstance(settings, Mapping):
            raise ConfigError(f"lora must be a LoRAConfig, a mapping or None, got {type(settings).__name__}.")
        known = [item.name for item in fields(cls)]
        for name in settings:
            if name not in known:
                raise ConfigError(f"lora has no setting {name!r}{closest(str(name), known)} Known: {', '.join(known)}.")
        return cls(**settings)


def _check_rank(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}.")
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, got {value}.")


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ConfigError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")
    if not math.isfinite(value):
        raise ConfigError(f"{name} must be finite, got {value}.")


def _check_positive(name: str, value: Any) -> None:
    _check_number(name, value)
    if value <= 0:
        raise ConfigError(f"{name} must be greater than 0, got {value}.")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}{closest(str(value), choices)}")


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        raise ConfigError(f"{name} must be a list of name patterns, got {value!r}.")
    for pattern in value:
        if not isinstance(pattern, str) or not pattern.strip():
            raise ConfigError(f"{name} holds {pattern!r}: every entry must be a non-empty name pattern.")
    if len(set(value)) < len(value):
        repeated = sorted({pattern for pattern in value if list(value).count(pattern) > 1})
        warnings.warn(f"{name} names {', '.join(map(repr, repeated))} more than once.", stacklevel=5)
    return tuple(dict.fromkeys(value))


def _pattern_values(name: str, value: Any, check: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must map name patterns to values, got {value!r}.")
    _patterns(name, list(value))
    for pattern, number in value.items():
        check(f"{name}[{pattern!r}]", number)
    return dict(value)
