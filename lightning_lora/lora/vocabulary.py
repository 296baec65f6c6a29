"""The check that nobody resized the vocabulary of a Hugging Face model after its layers were adapted.

``resize_token_embeddings`` changes tables in place, whose factors then fit no more, and puts new layers in the place of
others, whose updates are then lost without a word.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_lora.errors import LayerError, first_five
from lightning_lora.lora.layers.adapted import adapted_weights, following_layers
from lightning_lora.lora.layers.base import LoRALayer
from lightning_lora.lora.layers.embedding import LoRAEmbedding
from lightning_lora.lora.layers.linear import LoRALinear
from lightning_lora.lora.targets.roles import hugging_face_models


class VocabularyCheck:
    """A hook before ``forward`` that refuses a model whose vocabulary was resized after its layers were adapted."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = frozenset(_tables(model))
        self.num_tokens = vocabulary_size(model.config)

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Check the layers if the number of tokens has changed; comparing numbers costs nothing."""
        if vocabulary_size(model.config) != self.num_tokens:
            self.check(model)

    def check(self, model: nn.Module) -> None:
        """Raise `ConfigError` if an adapted layer was replaced, or has another size than its factors."""
        tables = _tables(model)
        changed = sorted(self.layers - tables.keys()) + [name for name, layer in tables.items() if not _fits(layer)]
        if changed:
            raise LayerError(
                f"the vocabulary was resized from {self.num_tokens} to {vocabulary_size(model.config)} tokens after "
                f"{first_five(changed)} had been adapted, and the update no longer fits. Resize first: call "
                f"resize_token_embeddings before inject_lora, apply_lora or load_adapter. remove_lora(module) takes "
                f"the adapters off."
            )


def watch_vocabulary(module: nn.Module) -> None:
    """Let every Hugging Face model in ``module`` with an adapted embedding or head check its vocabulary."""
    for _, model in hugging_face_models(module):
        if _tables(model):
            model.register_forward_pre_hook(VocabularyCheck(model))


def check_vocabulary(module: nn.Module) -> None:
    """Raise `ConfigError` if the vocabulary of a model in ``module`` was resized after injection."""
    for _, model in hugging_face_models(module):
        for hook in model._forward_pre_hooks.values():
            if isinstance(hook, VocabularyCheck):
                hook.check(model)


def unwatch_vocabulary(module: nn.Module) -> bool:
    """Remove the checks of all models in ``module``; returns whether there was one."""
    hooks = [
        (model._forward_pre_hooks, key)
        for _, model in hugging_face_models(module)
        for key, hook in model._forward_pre_hooks.items()
        if isinstance(hook, VocabularyCheck)
    ]
    for table, key in hooks:
        del table[key]
    return bool(hooks)


def _tables(model: nn.Module) -> dict[str, LoRALayer]:
    """Adapted layers that ``resize_token_embeddings`` may change: embeddings, heads, and those that follow them."""
    layers = {name: layer for name, (layer, _) in adapted_weights(model).items()} | following_layers(model)
    return {
        name: layer
        for name, layer in layers.items()
        if layer.lora_spec.role in ("embedding", "head") and isinstance(layer, (LoRAEmbedding, LoRALinear))
    }


def vocabulary_size(config: Any) -> int | None:
    """The size of the vocabulary of a Hugging Face model; None if it has none, or more than one."""
    try:
        return getattr(config.get_text_config(), "vocab_size", None)
    except ValueError:  # it has several models of text
        return None


def _fits(layer: LoRALayer) -> bool:
    """Whether the factors have the sizes that the layer has now; under FSDP1 they have none outside of ``forward``."""
    A, B = layer.lora_pair()
    num_in, num_out = layer.dimensions(layer)
    if A.ndim != 2 or B.ndim != 2:
        return True
    return sorted((A.shape[-1], B.shape[-2])) == sorted((num_in, num_out))
