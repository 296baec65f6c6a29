"""What a policy is compared with: the model as it was when training began, without a second model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_lora.errors import DataError, PolicySettingError, check_choice
from lightning_lora.lora.adapter import disable_lora, lora_state_dict
from lightning_lora.lora.growth import leading
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.lora.shards import reshard

KINDS = ("adapter_off", "frozen", "precomputed")
_STATE = "lightning_lora_reference"


class Reference:
    """The reference of a policy.

    - ``"adapter_off"``: the same model with its adapters off, and modules trained in full as they were loaded.
    - ``"frozen"``: the same model with a copy of what is trained, from the moment when training began. For an adapter
      that was trained before: a few megabytes.
    - ``"precomputed"``: log-probabilities of all rows, computed once when training begins. For full fine-tuning.

    Args:
        kind: One of these. None takes ``"precomputed"`` without LoRA, ``"adapter_off"`` if the adapters change nothing
            yet, and ``"frozen"`` otherwise.
        has_lora: Whether the model has adapters.

    Raises:
        ConfigError: If the kind needs adapters and there are none.
    """

    def __init__(self, kind: str | None, has_lora: bool) -> None:
        check_choice("reference", kind, KINDS, PolicySettingError, optional=True)
        if kind in ("adapter_off", "frozen") and not has_lora:
            raise PolicySettingError(
                f"reference={kind!r} needs adapters, and lora=None trains the whole model, which would be its own "
                "reference: give lora, or set reference='precomputed'."
            )
        self.kind = kind if has_lora else "precomputed"
        self._is_fixed = False
        self._frozen: dict[str, Tensor] = {}
        self._known: dict[int, float] = {}

    def fix(self, model: nn.Module) -> None:
        """Take the present model as the reference, unless a checkpoint has restored one."""
        if self._is_fixed:
            return
        if self.kind is None:
            self.kind = "adapter_off" if _changes_nothing(model) else "frozen"
        if self.kind == "frozen":
            reshard(model)
            self._frozen = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self._is_fixed = True

    @contextmanager
    def weights(self, model: nn.Module) -> Iterator[None]:
        """Within the context, without gradients, ``model`` computes what the reference computes.

        Weights change in place and are restored bit for bit, so no graph of the model may be waiting for its backward
        pass.
        """
        with torch.no_grad():
            if self.kind == "adapter_off":
                with disable_lora(model):
                    yield
                return
            # After a pass without gradients FSDP2 would compute with outermost parameters that are gathered already.
            reshard(model)
            parameters = dict(model.named_parameters())
            trained = {name: parameters[name].detach().clone() for name in self._frozen}
            try:
                _fill(parameters, self._frozen)
                yield
            finally:
                reshard(model)
                _fill(parameters, trained)

    def look_up(self, ids: Tensor, labels: Tensor) -> Tensor | None:
        """The precomputed log-probabilities of rows, ``(rows,)`` float64; None if they must be computed now.

        Args:
            ids: ``(rows, tokens)``.
            labels: ``(rows, tokens)``.

        Raises:
            DataError: If training has begun and a row is not known.
        """
        found = [self._known.get(key) for key in _keys(ids, labels)]
        missing = sum(value is None for value in found)
        if not missing:
            return torch.tensor(found, dtype=torch.float64, device=ids.device)
        if self._is_fixed:
            raise DataError(
                f"{missing} of {len(found)} rows were in no training or validation data when the run began, so their "
                "reference is not known: reference='precomputed' cannot score other rows later."
            )
        return None

    def keep(self, ids: Tensor, labels: Tensor, logprobs: Tensor) -> None:
        """Remember the log-probabilities of rows, with the arguments of `look_up`."""
        self._known |= dict(zip(_keys(ids, labels), logprobs.double().tolist(), strict=True))

    def share(self) -> None:
        """Give all ranks the rows of all ranks; a collective if there are several."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            found: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(found, self._known)
            self._known = {key: value for part in found for key, value in part.items()}

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Write the reference into a checkpoint, once it is fixed; a collective if the model is sharded."""
        if self._is_fixed:
            checkpoint[_STATE] = {
                "kind": self.kind,
                "frozen": {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in self._frozen.items()},
                "keys": torch.tensor(list(self._known), dtype=torch.int64),
                "logprobs": torch.tensor(list(self._known.values()), dtype=torch.float64),
            }

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the reference of a checkpoint's run."""
        if (state := checkpoint.get(_STATE)) is not None:
            self.kind, self._frozen, self._is_fixed = state["kind"], dict(state["frozen"]), True
            self._known = dict(zip(state["keys"].tolist(), state["logprobs"].tolist(), strict=True))


def _changes_nothing(model: nn.Module) -> bool:
    """Whether every update is zero, as it is at the default start. A collective if ``model`` is sharded."""
    state = lora_state_dict(model) if lora_layers(model) else {}
    return not any(bool(tensor.any()) for name, tensor in state.items() if "lora_B" in name)


def _fill(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parameter: Any = parameters[name]
        if parameter.shape != value.shape:
            # Its rank has grown since, at the same scale: with zeros in the new part, the update is the one before.
            parameter.zero_()
            parameter = leading(parameter, value)
        if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
            value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
        parameter.copy_(value)


def _keys(ids: Tensor, labels: Tensor) -> list[int]:
    """A number for the tokens of each row and what of them is trained on, whatever its padding."""
    keys = []
    for row, marked in zip(ids.cpu(), labels.cpu(), strict=True):
        # Answers end a row: behind the last label is nothing that its log-probability depends on.
        end = int((marked != -100).nonzero()[-1]) + 1 if (marked != -100).any() else 0
        text = torch.stack([row[:end], marked[:end]]).numpy().tobytes()
        keys.append(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big", signed=True))
    return keys
