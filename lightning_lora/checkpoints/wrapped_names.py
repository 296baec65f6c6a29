"""One checkpoint for a module and for the same module compiled: wrappers put segments into the names of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule

from lightning_lora.files.lightning_checkpoint import CHECKPOINT_KEY
from lightning_lora.lora.patterns import plain_name, state_dict_name

# Lightning's `WeightAveraging` keeps a second copy of the weights under the second key.
STATE_KEYS = ("state_dict", "current_model_state")


def use_own_names(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Give the tensors of ``checkpoint`` the names that they have in ``module``, in place.

    ``torch.compile`` puts ``_orig_mod`` into the names in the state dict. Names that are equal without such segments
    mean the same tensor; all others stay as they are, and are compared later.
    """
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    names = {plain_name(name): state_dict_name(name) for name, _ in tensors}

    def renamed(mapping: Mapping[Any, Any]) -> dict[Any, Any]:
        return {_own(names, name): value for name, value in mapping.items()}

    for key in STATE_KEYS:
        if key in checkpoint:
            checkpoint[key] = renamed(checkpoint[key])
    manifest = checkpoint.get(CHECKPOINT_KEY)
    if isinstance(manifest, dict) and isinstance(manifest.get("tensors"), dict):
        manifest["tensors"] = renamed(manifest["tensors"])
    averaging = checkpoint.get("averaging_state")
    if isinstance(averaging, dict) and isinstance(averaging.get("average"), dict):
        averaging["average"] = renamed(averaging["average"])
    for state in checkpoint.get("optimizer_states", ()):
        if "state" in state and "param_groups" in state:
            state["state"] = renamed(state["state"])
            for group in state["param_groups"]:
                group["params"] = [_own(names, name) for name in group["params"]]


def _own(names: Mapping[str, str], name: Any) -> Any:
    """The name in the module; anything but a string, as a position in an optimizer, stays."""
    return names.get(plain_name(name), name) if isinstance(name, str) else name
