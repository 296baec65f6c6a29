"""Settings that change nothing in this module: told, so that nobody takes them for having worked."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

from torch import nn

from lightning_lora.errors import first_five
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.layers.base import LoRALayer
from lightning_lora.lora.layers.embedding import LoRAEmbedding
from lightning_lora.lora.layers.experts import LoRAFusedExperts
from lightning_lora.lora.targets.adaptable import Candidates
from lightning_lora.lora.targets.shared_weights import TiedWeights


def warn_of_unused(
    root: nn.Module,
    candidates: Candidates,
    skipped: Mapping[str, str],
    kinds: Mapping[str, type[LoRALayer]],
    tied: TiedWeights,
    config: LoRAConfig,
) -> None:
    """Warn once of settings that are not the default and have no effect on ``root``.

    Args:
        root: The module to adapt.
        candidates: All weights below it.
        skipped: Name of every weight that is left alone to the reason.
        kinds: Name of every layer to adapt to the class of adapted layer that it becomes.
        tied: What happens to shared weights.
        config: The settings.
    """
    told = [*_unused(kinds, tied, config), *_passed_over(candidates, skipped, config)]
    if told:
        warnings.warn(f"settings without an effect on this {type(root).__name__}: {'; '.join(told)}.", stacklevel=4)


def _unused(kinds: Mapping[str, type[LoRALayer]], tied: TiedWeights, config: LoRAConfig) -> Iterator[str]:
    shared = set(tied.followers.values())
    embeddings = [n for n, kind in kinds.items() if issubclass(kind, LoRAEmbedding) and n not in shared]
    if config.share_expert_factors and not any(issubclass(kind, LoRAFusedExperts) for kind in kinds.values()):
        yield "share_expert_factors (no experts that are stored in one parameter are adapted)"
    if config.tied_weights != "refuse" and not (tied.untied or tied.followers):
        yield f"tied_weights={config.tied_weights!r} (no weight to adapt is shared)"
    if config.dropout and embeddings:
        yield f"dropout in {first_five(embeddings)} (the input of an embedding is no number to drop)"
    if config.init != "default" and len(embeddings) == len(kinds):
        yield f"init={config.init!r} (embeddings always start by default)"


def _passed_over(candidates: Candidates, skipped: Mapping[str, str], config: LoRAConfig) -> Iterator[str]:
    """Settings that name weights, none of which is adapted."""
    adaptable = {name: weight for name, weight in candidates.items() if not weight.refusal}
    patterns = () if isinstance(config.targets, str) else config.targets
    asked = {f"target {each!r}": [n for n, w in adaptable.items() if w.matches(each)] for each in patterns}
    for option, role in (("adapt_head", "head"), ("adapt_embeddings", "embedding")):
        asked[option] = [n for n, w in adaptable.items() if w.role == role] if getattr(config, option) else []
    for setting, names in asked.items():
        if names and all(name in skipped for name in names):
            yield f"{setting} ({first_five(f'{name} is {skipped[name]}' for name in names)})"
