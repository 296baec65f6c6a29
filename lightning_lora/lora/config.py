"""What to adapt and how: one frozen, validated set of LoRA settings."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lightning_lora.errors import LoRASettingError, check_choice, did_you_mean

_TARGETS = ("all", "attention", "mlp", "experts")
_SCALINGS = ("standard", "rslora")
_INITS = ("default", "gaussian", "orthogonal", "pissa", "gradient")
_TIED_WEIGHTS = ("refuse", "untie", "both")
_ADAPTER_DTYPES = ("float32", "bfloat16", "float64")


@dataclass(frozen=True)
class LoRAConfig:
    r"""LoRA settings: each chosen weight ``W`` becomes ``W + scale * B A`` with ``W`` frozen, ``A`` and ``B`` trained.

    ``A`` has shape ``(rank, in)``, ``B`` has shape ``(out, rank)``. ``B`` starts at zero (``A`` in embeddings), so a
    fresh adapter does not change the model. The defaults follow *LoRA Without Regret*.

    A *name pattern* selects modules by their dotted name. It is the whole name (``model.layers.0.mlp.up_proj``), a
    dotted suffix (``up_proj``) or a glob (``*.mlp.*``). A pattern that matches nothing is an error.

    Args:
        rank: Inner dimension of the update, at least 1. A higher rank has room for more training data. A layer smaller
            than the rank is adapted at its full rank, with a warning.
        alpha: Numerator of the scale. Keep 32 at every rank: the best learning rate then hardly depends on the rank.
        targets: Layers to adapt: ``"all"`` (every weight matrix of attention, MLP and MoE experts), ``"attention"``,
            ``"mlp"``, ``"experts"``, or a list of name patterns such as ``["q_proj", "v_proj"]``.
        exclude: Name patterns of layers not to adapt, even if ``targets`` selects them.
        rank_pattern: Ranks of single layers, as a mapping from name pattern to rank. The first match wins.
        alpha_pattern: Alphas of single layers, as a mapping from name pattern to alpha. The first match wins.
        dropout: Probability of dropping each input of the update during training, in ``[0, 1)``. Embeddings have none.
        scaling: Scale of the update: ``"standard"`` (alpha / rank) or ``"rslora"`` (alpha / sqrt(rank)).
        init: Initial values of A. ``"default"``: uniform in ``[-1/sqrt(in), 1/sqrt(in)]``. ``"gaussian"``: normal with
            standard deviation 1/rank. ``"orthogonal"``: A and B are both random, in rank spaces orthogonal to each
            other, so that ``B A`` starts at zero; needs even ranks. ``"pissa"``: A and B start as the principal part of
            the weight, which a second half of the factors takes off again and keeps; they have twice the rank.
            ``"gradient"``: the same with singular vectors of the gradient of the weight, measured as `fit` starts; for
            linear layers. Embeddings always start as by default.
        lr_multiplier: Factor on the learning rate of the adapters. Give the task the learning rate of full fine-tuning;
            the adapters train at this many times it.
        adapt_head: Also adapt the output head.
        adapt_embeddings: Also adapt the embeddings.
        trainable: Name patterns of modules to train in full beside the adapters, such as a new classification head. A
            head that the checkpoint of a transformers model did not hold is trained in full without being named.
        adapter_dtype: Type of A and B: ``"float32"``, ``"bfloat16"`` or ``"float64"``. None: the type of the base
            weight, but at least float32.
        share_expert_factors: For mixtures of experts stored in one parameter. True: all experts share the factor on
            the side of the hidden dimension (A of the first matrix, B of the last), and have the full rank. False:
            every expert has its own A and B, of rank ``rank // active experts`` and at least 1.
        tied_weights: What to do when a weight to adapt is shared with another layer, as an output head often shares
            the embedding. ``"refuse"``: raise an error. ``"untie"``: give each layer that is adapted or trained in
            full its own copy of the weight. ``"both"``: adapt the shared weight, with one update for all layers that
            share it.
        lora_plus_ratio: LoRA+: factor on the learning rate of the factor that starts at zero (B; A in embeddings),
            which then is ``lora_plus_ratio`` times that of the other factor. 1: both train at one rate.
        lr_multiplier_pattern: Factors on the learning rate of single layers, as a mapping from name pattern to factor,
            in place of ``lr_multiplier`` for adapters and of 1 for modules that are trained in full. The first match
            wins.
        dora: Also learn a magnitude ``m`` for each output feature: the weight is ``m (W + scale * B A)``, divided by
            the norm of each row of that sum. ``m`` starts as the norms of ``W``. For linear layers, convolutions and
            embeddings. A step costs more, and the benefit is disputed (docs/use/dora.md).
        init_batches: Training batches, on each device, that ``init="gradient"`` measures the gradient on, at least 1.
            With any other init it is not used, and that is warned of.

    Raises:
        ConfigError: If a value has the wrong type or lies outside its range.

    References:
        Hu et al., *LoRA*, ICLR 2022, https://arxiv.org/abs/2106.09685;
        Schulman et al., *LoRA Without Regret*, 2025, https://thinkingmachines.ai/blog/lora/ (defaults);
        Kalajdzievski, *rsLoRA*, 2023, https://arxiv.org/abs/2312.03732;
        Meng et al., *PiSSA*, NeurIPS 2024, https://arxiv.org/abs/2404.02948;
        Wang et al., *LoRA-GA*, NeurIPS 2024, https://arxiv.org/abs/2407.05000;
        Hayou et al., *LoRA+*, ICML 2024, https://arxiv.org/abs/2402.12354;
        Liu et al., *DoRA*, ICML 2024, https://arxiv.org/abs/2402.09353. ``docs/use/hyperparameters.md`` says what
        speaks for each setting.

    Example:
        >>> config = LoRAConfig(rank=16, targets=["q_proj", "*.mlp.*"], rank_pattern={"down_proj": 4})
        >>> config.scale(rank=16, alpha=32.0)
        2.0
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
    lora_plus_ratio: float = 1.0
    lr_multiplier_pattern: dict[str, float] = field(default_factory=dict)
    dora: bool = False
    init_batches: int = 8

    def __post_init__(self) -> None:
        _check_rank("rank", self.rank)
        _check_rank("init_batches", self.init_batches)
        _check_positive("alpha", self.alpha)
        _check_positive("lr_multiplier", self.lr_multiplier)
        _check_positive("lora_plus_ratio", self.lora_plus_ratio)
        _check_number("dropout", self.dropout)
        if not 0 <= self.dropout < 1:
            raise LoRASettingError(f"dropout must be in [0, 1), got {self.dropout!r}.")
        check_choice("scaling", self.scaling, _SCALINGS)
        check_choice("init", self.init, _INITS)
        check_choice("tied_weights", self.tied_weights, _TIED_WEIGHTS)
        for name in ("adapt_head", "adapt_embeddings", "share_expert_factors", "dora"):
            if not isinstance(getattr(self, name), bool):
                raise LoRASettingError(f"{name} must be true or false, got {getattr(self, name)!r}.")
        if self.init_batches != LoRAConfig.init_batches and self.init != "gradient":
            # From the dataclass's own __init__, so that copies of these settings do not warn again.
            warnings.warn(
                f"init_batches={self.init_batches} is not used: init={self.init!r} measures no gradient. Set init to "
                f"'gradient', or leave init_batches out.",
                stacklevel=2,
            )
        if self.dora and self.init in ("pissa", "gradient"):
            raise LoRASettingError(
                f"dora=True starts at the norms of the base weights, and init={self.init!r} takes a part out of them: "
                f"set init to 'default', or dora to False."
            )
        if self.adapter_dtype is not None:
            self._set("adapter_dtype", _dtype_name(self.adapter_dtype))
        self._set("targets", _checked_targets(self.targets))
        self._set("exclude", _checked_patterns("exclude", self.exclude))
        self._set("trainable", _checked_patterns("trainable", self.trainable))
        self._set("rank_pattern", _checked_table("rank_pattern", self.rank_pattern, _check_rank))
        for name in ("alpha_pattern", "lr_multiplier_pattern"):
            self._set(name, _checked_table(name, getattr(self, name), _check_positive))

    def _set(self, name: str, value: object) -> None:
        """Set a field of the frozen config while it is built."""
        object.__setattr__(self, name, value)

    def scale(self, rank: int, alpha: float) -> float:
        """The dimensionless factor of ``B A`` in a layer with this rank and alpha."""
        return alpha / rank if self.scaling == "standard" else alpha / math.sqrt(rank)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain types, for YAML, JSON and checkpoints."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any] | LoRAConfig) -> LoRAConfig:
        """Build a config from a mapping of field names to values; a `LoRAConfig` is returned unchanged.

        Raises:
            ConfigError: If a name is not a field, or a value is out of range.
        """
        if isinstance(settings, LoRAConfig):
            return settings
        if not isinstance(settings, Mapping):
            raise LoRASettingError(f"lora must be a LoRAConfig, a mapping or None, got {type(settings).__name__}.")
        known = [item.name for item in fields(cls)]
        for name in settings:
            if name not in known:
                hint = did_you_mean(str(name), known)
                raise LoRASettingError(f"lora has no setting {name!r}{hint} Known: {', '.join(known)}.")
        return cls(**settings)


def setting_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What differs between two results of `LoRAConfig.to_dict`, in words.

    >>> setting_changes(LoRAConfig(rank=4).to_dict(), LoRAConfig(rank=8, dropout=0.1).to_dict())
    'rank 4 -> 8, dropout 0.0 -> 0.1'
    """
    names = [name for name in before if name in after and before[name] != after[name]]
    return ", ".join(f"{name} {before[name]!r} -> {after[name]!r}" for name in names)


def _check_rank(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise LoRASettingError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}.")
    if value < 1:
        raise LoRASettingError(f"{name} must be at least 1, got {value}.")


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise LoRASettingError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")
    if not math.isfinite(value):
        raise LoRASettingError(f"{name} must be finite, got {value}.")


def _check_positive(name: str, value: Any) -> None:
    _check_number(name, value)
    if value <= 0:
        raise LoRASettingError(f"{name} must be greater than 0, got {value}.")


def _dtype_name(dtype: Any) -> str:
    # torch.dtype prints as "torch.float32". Only its name is kept, so that a config stays plain data.
    name = str(dtype).removeprefix("torch.")
    if name == "float16":
        raise LoRASettingError(
            "adapters cannot be trained in float16: AdamW's eps of 1e-12 is zero there, and so are most of its "
            "second moments. Leave adapter_dtype out (float32 beside a float16 base), or use bfloat16."
        )
    check_choice("adapter_dtype", name, _ADAPTER_DTYPES)
    return name


def _checked_targets(targets: Any) -> str | tuple[str, ...]:
    if isinstance(targets, str):
        if targets not in _TARGETS:
            raise LoRASettingError(
                f"targets must be one of {', '.join(_TARGETS)} or a list of name patterns, got {targets!r}"
                f"{did_you_mean(targets, _TARGETS)} For a single pattern write [{targets!r}]."
            )
        return targets
    patterns = _checked_patterns("targets", targets)
    if not patterns:
        raise LoRASettingError("targets is an empty list: name at least one pattern, or use 'all'.")
    return patterns


def _checked_patterns(name: str, patterns: Any) -> tuple[str, ...]:
    if isinstance(patterns, str) or not isinstance(patterns, (list, tuple)):
        raise LoRASettingError(f"{name} must be a list of name patterns, got {patterns!r}.")
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern.strip():
            raise LoRASettingError(f"{name} holds {pattern!r}: every entry must be a non-empty name pattern.")
    repeated = sorted(pattern for pattern, count in Counter(patterns).items() if count > 1)
    if repeated:
        warnings.warn(f"{name} names {', '.join(map(repr, repeated))} more than once.", stacklevel=5)
    return tuple(dict.fromkeys(patterns))


def _checked_table(name: str, table: Any, check_value: Callable[[str, Any], None]) -> dict[str, Any]:
    if not isinstance(table, Mapping):
        raise LoRASettingError(f"{name} must map name patterns to values, got {table!r}.")
    _checked_patterns(name, list(table))
    for pattern, value in table.items():
        check_value(f"{name}[{pattern!r}]", value)
    return dict(table)
