"""What ``save_pretrained`` of an adapted Hugging Face model writes: the model with its updates folded in.

Without this it would write the factors beside the weights of the base, and ``from_pretrained`` would read the base.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterStateError
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.lora.layers.base import is_factor
from lightning_lora.lora.layers.quantised_weights import quantised_layers
from lightning_lora.lora.patterns import plain_name
from lightning_lora.lora.vocabulary import check_vocabulary

Merged = Callable[[nn.Module], AbstractContextManager[None]]

_METHOD = "save_pretrained"


class MergedSaving:
    """Takes the place of ``model.save_pretrained``, and with it of all that calls it, such as ``push_to_hub``.

    Args:
        merged: Merges the updates of a module within a context.
    """

    def __init__(self, model: Any, merged: Merged) -> None:
        self.model, self.merged = model, merged

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Write the model with its updates folded in, and warn of that; it is left as it was, bit for bit.

        Raises:
            ConfigError: If the model is quantised, its vocabulary was resized after injection, or ``state_dict`` holds
                other adapters than the model.
            AlreadyShardedError: If the weights are sharded.
        """
        check_vocabulary(self.model)
        write = type(self.model).save_pretrained
        asked = inspect.signature(write).bind(self.model, *args, **kwargs)
        state = asked.arguments.get("state_dict")
        if not lora_layers(self.model) or (state is not None and not any(map(is_factor, state))):
            return write(*asked.args, **asked.kwargs)
        self._check(state)
        with self.merged(self.model):
            merged = {plain_name(name): value for name, value in self.model.state_dict().items() if not is_factor(name)}
            asked.arguments["state_dict"] = apart(merged, self.model)
            written = write(*asked.args, **asked.kwargs)
        warnings.warn(
            f"save_pretrained wrote {type(self.model).__name__} with the updates of {len(lora_layers(self.model))} "
            f"layers merged in. save_adapter(model, path) writes the adapter alone.",
            stacklevel=2,
        )
        return written

    def _check(self, state: Mapping[str, Any] | None) -> None:
        if quantised_layers(self.model):
            raise AdapterStateError(
                "save_pretrained cannot write adapters with a quantised model: write the adapter with "
                "save_adapter(model, path), or the merged model with MergeOnFitEnd or `lightning-lora export`."
            )
        own = self.model.state_dict() if state is not None else {}
        other = [name for name, value in (state or {}).items() if is_factor(name) and not _equal(own.get(name), value)]
        if other:
            raise AdapterStateError(
                f"the state_dict given to save_pretrained has other adapters than the model ({other[0]}): load it into "
                f"the model first, or leave it out."
            )


def apart(state: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The state dict of a Hugging Face model, with copies of shared tensors if its config says that none are shared.

    ``save_pretrained`` leaves out all but one of the names of a tensor, and the model would not share it when loaded.
    """
    if getattr(model.config, "tie_word_embeddings", True):
        return dict(state)
    seen: set[int] = set()
    values = {}
    for name, value in state.items():
        is_seen = isinstance(value, Tensor) and value.data_ptr() in seen and value.numel() > 0
        values[name] = value.clone() if is_seen else value
        seen |= {value.data_ptr()} if isinstance(value, Tensor) else set()
    return values


def save_merged_models(module: nn.Module, merged: Merged) -> None:
    """Let every Hugging Face model in ``module`` that has adapters write itself merged."""
    for model in _models(module):
        if lora_layers(model):
            model.__dict__[_METHOD] = MergedSaving(model, merged)


def save_plain_models(module: nn.Module) -> None:
    """Let every Hugging Face model in ``module`` write itself as transformers does."""
    for model in _models(module):
        if isinstance(model.__dict__.get(_METHOD), MergedSaving):
            del model.__dict__[_METHOD]


def _models(module: nn.Module) -> Iterator[nn.Module]:
    """All Hugging Face models in ``module``, those inside others too."""
    library = sys.modules.get("transformers.modeling_utils")
    return (child for child in module.modules() if library is not None and isinstance(child, library.PreTrainedModel))


def _equal(own: Tensor | None, given: Tensor) -> bool:
    return own is not None and own.shape == given.shape and torch.equal(own.cpu(), given.cpu())
