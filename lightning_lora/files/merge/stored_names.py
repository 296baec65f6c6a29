"""The names and layouts that transformers gives the weights of a model on disk, found without reading any weight."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterFileError


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
            raise AdapterFileError(
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
        self._parameters = dict(self.module.named_parameters())

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
