"""The names and layouts that transformers gives the weights of a model on disk, found without reading any weight."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterFolderError
from lightning_lora.lora.targets.shared_weights import weight_owners


class CheckpointModel:
    """The model that transformers builds from a checkpoint folder, on the meta device.

    Args:
        folder: A folder with ``config.json``; no code in it is run.

    Raises:
        AdapterFileError: If the folder does not say what model it is, or transformers does not know the model.
    """

    def __init__(self, folder: Path) -> None:
        import transformers  # imported here, as a merge of linear layers alone does not need it

        try:
            config: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            kind: Any = getattr(transformers, (config.architectures or [""])[0])
        except (OSError, ValueError, AttributeError, KeyError) as error:
            raise AdapterFolderError(
                f"{folder} stores the adapted weights under other names than the model has, and which model it is "
                f"cannot be told: {error}"
            ) from error
        self._build(kind, config)

    @classmethod
    def like(cls, model: Any) -> CheckpointModel:
        """A model like ``model``, a model of transformers, without its values, and as if it came from no checkpoint.

        What a loaded model remembers of its own checkpoint must not decide how other files name its layers.
        """
        own = cls.__new__(cls)
        own._build(type(model), model.config)
        return own

    def _build(self, kind: Any, config: Any) -> None:
        with torch.device("meta"):
            self.module: nn.Module = kind(config)
        self._parameters = dict(self.module.named_parameters(remove_duplicate=False))
        self._config = config

    @property
    def can_untie(self) -> bool:
        """Whether the model heeds a config that unties embeddings and head; T5 always ties those that are equal."""
        settings = self._config.to_dict() | {"tie_word_embeddings": False}
        return not type(self._config).from_dict(settings).tie_word_embeddings

    def shared(self) -> list[list[str]]:
        """Names of the parameters that share a weight, for each weight; first the one that the others are tied to."""
        keys: Any = getattr(self.module, "all_tied_weights_keys", None)
        sources = set(keys.values()) if isinstance(keys, dict) else set()
        groups = [names for names in weight_owners(self.module).values() if len(names) > 1]
        return [sorted(names, key=lambda name: name not in sources) for names in groups]

    def parameter_name(self, name: str) -> str | None:
        """The model's name of a parameter, which may leave out the first part of ``name``; None if it has none."""
        return next((candidate for candidate in (name, name.partition(".")[2]) if self.has(candidate)), None)

    def is_inner_name(self, name: str) -> bool:
        """Whether ``name`` is a parameter's name in a model with a head, around this one, which has none."""
        prefix = getattr(self.module, "base_model_prefix", "")
        return bool(prefix) and not self.has(name) and name.startswith(f"{prefix}.")

    def has(self, name: str) -> bool:
        """Whether the model has a parameter of this name."""
        return name in self._parameters

    def stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the model, by parameter name, as its checkpoints store them."""
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self.module, dict(tensors))  # pyright: ignore[reportArgumentType]

    def stored_name(self, name: str) -> str | None:
        """The name of a parameter in checkpoints; None if there is no such parameter, or it is stored cut or turned."""
        parameter = self._parameters.get(name)
        if parameter is None:
            return None
        try:
            stored = self.stored({name: parameter})
        except ValueError:  # it is stored in one tensor with others
            return None
        return next((other for other, tensor in stored.items() if tensor is parameter), None)


def in_base(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The name in the checkpoint, which may leave out the first part of the model's name; None if there is none."""
    return next((candidate for candidate in (name, name.partition(".")[2]) if candidate in shapes), None)
