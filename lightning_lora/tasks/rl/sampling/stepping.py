"""One new token of all rows at a time, by a model that keeps keys and values of the tokens before."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.tasks.rl.sampling.cache import make_cache, take_rows

_CACHE_NAMES = ("cache", "past_key_values")
"""How `forward` names its cache: since transformers 5.24, and before."""


class Stepping:
    """Rows of tokens that a causal language model of transformers reads step by step.

    Args:
        model: The model, in eval mode.
        limit: Positions of the model at most; None sets none.
        use_cache: Whether keys and values of earlier tokens are kept. Without, and for models that cannot, all tokens
            are read again at each step.

    Attributes:
        device: Where the tokens are.
    """

    def __init__(self, model: nn.Module, limit: int | None, use_cache: bool = True) -> None:
        self.model = model
        self._last_position = sys.maxsize if limit is None else limit - 1
        takes = inspect.signature(model.forward).parameters
        self._cache_name = next((name for name in _CACHE_NAMES if name in takes), None) if use_cache else None
        self._cache = make_cache(model.config) if self._cache_name else None  # type: ignore[arg-type]
        self._takes_positions = "position_ids" in takes
        self._keeps_last = "logits_to_keep" in takes
        self.device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        self._ids = self._mask = self._positions = torch.empty(0)
        self._is_padded = False

    def begin(self, prompts: list[Tensor], group_size: int) -> Tensor:
        """Read each prompt once, and repeat it ``group_size`` times.

        Args:
            prompts: Tokens of each prompt, ``(length,)``.
            group_size: Rows of each prompt.

        Returns:
            Logits of the next token, ``(rows, vocabulary)``.
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        width = max(len(prompt) for prompt in prompts)
        places = torch.arange(width, device=self.device) - (width - lengths).unsqueeze(-1)
        self._mask, self._positions = places >= 0, places.clamp(min=0)
        self._is_padded = any(len(prompt) < width for prompt in prompts)
        # Padding is not seen: any token will do, and 0 is in every vocabulary.
        self._ids = torch.zeros(len(prompts), width, dtype=torch.int64, device=self.device)
        for row, prompt in enumerate(prompts):
            self._ids[row, width - len(prompt) :] = prompt.to(self.device)
        logits = self._forward(self._ids, self._positions)
        if group_size > 1:
            rows = torch.arange(len(prompts), device=self.device).repeat_interleave(group_size)
            self.keep(rows)
            logits = logits[rows]
        return logits

    def next(self, tokens: Tensor) -> Tensor:
        """Append a token to each row, ``(rows,)``, and return the logits of the next one, ``(rows, vocabulary)``."""
        # A row that is done goes on with the others, but has no position beyond the last.
        position = (self._positions[:, -1:] + 1).clamp(max=self._last_position)
        self._mask = torch.cat([self._mask, torch.ones_like(position, dtype=torch.bool)], -1)
        if self._cache is not None:
            self._positions = position
            return self._forward(tokens.unsqueeze(-1), position)
        self._ids = torch.cat([self._ids, tokens.unsqueeze(-1)], -1)
        self._positions = torch.cat([self._positions, position], -1)
        return self._forward(self._ids, self._positions)

    def keep(self, rows: Tensor) -> None:
        """Go on with the rows of these numbers, ``(rows,)``."""
        self._mask, self._positions = self._mask[rows], self._positions[rows]
        if self._cache is None:
            self._ids = self._ids[rows]
        else:
            take_rows(self._cache, rows)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        arguments: dict[str, Any] = {"input_ids": ids, "use_cache": self._cache is not None}
        # Without padding attention needs no mask, and is faster.
        arguments["attention_mask"] = self._mask.long() if self._is_padded or self._cache is None else None
        if self._takes_positions:
            arguments["position_ids"] = positions
        if self._keeps_last:
            arguments["logits_to_keep"] = 1
        if self._cache_name:
            arguments[self._cache_name] = self._cache
        return self.model(**arguments).logits[:, -1]
