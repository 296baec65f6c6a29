"""How many experts of a mixture are active for one token: what the rank of each is divided by."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

# Attributes of a mixture, its router or its config; transformers and others have found no single name.
_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k",
    "topk",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "num_selected_experts",
    "k",
)


def active_experts(root: nn.Module, name: str) -> int:
    """Experts per token of the mixture that the expert layer ``name`` is in, read from the modules around it.

    1, with a warning, where nothing says: every expert then gets the whole rank.

    References:
        *LoRA Without Regret*, 2025: rank / active experts keeps the ratio of adapter to base parameters that dense
        layers have.
    """
    path = name
    while True:
        module = root.get_submodule(path)
        for holder in (module, *(getattr(module, part, None) for part in ("config", "gate", "router"))):
            number = _number(holder)
            if number:
                return number
        if not path:
            break
        path = path.rpartition(".")[0]
    warnings.warn(
        f"nothing in {type(root).__name__} says how many experts are active for a token (looked for "
        f"{', '.join(_NAMES)}): each expert gets the whole rank. Set rank_pattern for the experts.",
        stacklevel=2,
    )
    return 1


def _number(holder: Any) -> int:
    values = (getattr(holder, name, None) for name in _NAMES)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool) and value > 0), 0)
