"""Keys and values of earlier tokens, in memory that is reserved ahead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer
from typing_extensions import override

_ROOM = 64
"""Tokens for which room is made at once."""


class ReservedLayer(DynamicLayer):
    """Keys and values of a layer, ``(rows, heads, tokens, width)``, as views of larger tensors.

    The layer of transformers copies everything for each new token; its static layer copies nothing, but attends to all
    tokens that may ever come.
    """

    @override
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin without tokens."""
        super().lazy_initialization(key_states, value_states)
        self._all_keys, self._all_values = key_states[:, :, :0], value_states[:, :, :0]

    @override
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens, and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if after > self._all_keys.shape[-2]:
            self._all_keys = _with_room(self._all_keys[:, :, :before], after)
            self._all_values = _with_room(self._all_values[:, :, :before], after)
        self._all_keys[:, :, before:after] = key_states
        self._all_values[:, :, before:after] = value_states
        keys, values = self._all_keys[:, :, :after], self._all_values[:, :, :after]
        self.keys, self.values = keys, values
        return keys, values

    @override
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take rows by number, some of them several times or not at all."""
        if tokens := self.get_seq_length():
            self._all_keys = self._all_keys[beam_idx, :, :tokens]
            self._all_values = self._all_values[beam_idx, :, :tokens]
            self.keys, self.values = self._all_keys, self._all_values


def _with_room(states: Tensor, tokens: int) -> Tensor:
    # In proportion to what is there, so that the copies of a long completion stay few.
    room = tokens + max(_ROOM, tokens // 4)
    wider = states.new_empty(*states.shape[:2], room, states.shape[-1])
    wider[:, :, : states.shape[-2]] = states
    return wider


def make_cache(config: PretrainedConfig) -> DynamicCache:
    """An empty cache for a model: of our layers, but where the model slides a window or keeps a state."""
    cache = DynamicCache(config=config)
    cache.layers = [ReservedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def take_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Let the rows of the cache be those of these numbers, ``(new rows,)``."""
    cache.reorder_cache(rows.to(torch.int64))  # type: ignore[arg-type]
