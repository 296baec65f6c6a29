"""What each layer is in its model: attention, mlp, experts, router, embedding, head, or other.

Roles are read from structure (types, sibling names, weight tying, the Hugging Face base model), not from a list of
model names.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn

from lightning_lora.errors import ConfigError
from lightning_lora.layers.registry import adapter_kind, refusal
from lightning_lora.patterns import first_match

ROLES = ("attention", "mlp", "experts", "router", "embedding", "head", "other")

_ATTENTION_NAMES = frozenset(
    {"attn", "attention", "self_attn", "cross_attn", "self_attention", "encoder_attn", "mixer"}
)
_MLP_NAMES = frozenset({"mlp", "ffn", "feed_forward", "feedforward"})
_QUERY_KEY_VALUE = (
    {"q_proj", "k_proj", "v_proj"},
    {"query", "key", "value"},
    {"to_q", "to_k", "to_v"},
    {"q", "k", "v"},
    {"c_attn"},
    {"qkv"},
    {"qkv_proj"},
    {"Wqkv"},
    {"query_key_value"},
)
_REGISTERED: dict[str, str] = {}


def register_role(pattern: str, role: str) -> None:
    """Say what the modules matching a name pattern are, ahead of what their structure tells.

    Args:
        pattern: A name pattern (see `LoRAConfig`).
        role: One of ``attention, mlp, experts, router, embedding, head, other``.

    Raises:
        ConfigError: If the role is unknown or the pattern is empty.
    """
    if role not in ROLES:
        raise ConfigError(f"role must be one of {', '.join(ROLES)}, got {role!r}.")
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"register_role needs a non-empty name pattern, got {pattern!r}.")
    _REGISTERED[pattern] = role


def module_roles(root: nn.Module) -> dict[str, str]:
    """Dotted name to role of every module with weights below ``root`` (itself included, under the empty name).

    Layers that would be adapted but for a `refusal` have their role too.
    """
    modules = dict(root.named_modules())
    heads = _heads(root)
    roles = {}
    for name, module in modules.items():
        if adapter_kind(module) is None and refusal(module) is None:
            continue
        registered = first_match(name, _REGISTERED, "")
        if registered:
            roles[name] = registered
        elif isinstance(module, nn.Embedding):
            roles[name] = "embedding"
        else:
            roles[name] = "head" if id(module) in heads else _role_by_place(name, modules)
    return roles


def hugging_face_models(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every transformers model in ``root`` that is not inside another one, with its dotted name."""
    # Where the library was never imported no module can be one of its models, and the core need not import it.
    library = sys.modules.get("transformers.modeling_utils")
    if library is None:
        return
    outer: list[str] = []
    for name, module in root.named_modules():
        if isinstance(module, library.PreTrainedModel) and not any(_inside(name, prefix) for prefix in outer):
            outer.append(name)
            yield name, module


def _inside(name: str, prefix: str) -> bool:
    return prefix == "" or name.startswith(f"{prefix}.")


def _heads(root: nn.Module) -> set[int]:
    """Identities of output layers: what lies outside a model's base, or shares its weight with an embedding."""
    heads = {id(module) for name, module in root.named_modules() if name.rpartition(".")[2] == "lm_head"}
    tables = {id(module.weight) for module in root.modules() if isinstance(module, nn.Embedding)}
    heads |= {id(module) for module in root.modules() if isinstance(module, nn.Linear) and id(module.weight) in tables}
    for _, model in hugging_face_models(root):
        heads.add(id(model.get_output_embeddings()))  # pyright: ignore[reportCallIssue]
        base = model.base_model
        if isinstance(base, nn.Module) and base is not model:
            inside = {id(module) for module in base.modules()}
            heads |= {id(module) for module in model.modules() if id(module) not in inside}
    return heads


def _role_by_place(name: str, modules: dict[str, nn.Module]) -> str:
    """The role of the nearest ancestor that has one; the rest of a block with attention in it is its MLP."""
    own = _role_of_container(name.rpartition(".")[2], modules[name])
    if own:
        return own
    path, leaf = name, ""
    block_with_attention = False
    while path:
        path, _, leaf = path.rpartition(".")
        parent = modules[path]
        if leaf in ("router", "gate", "shared_expert_gate") and hasattr(parent, "experts"):
            return "router"
        role = _role_of_container(path.rpartition(".")[2], parent)
        if role:
            return role
        block_with_attention = block_with_attention or any(
            _role_of_container(child_name, child) == "attention" for child_name, child in parent.named_children()
        )
        if isinstance(parent, nn.ModuleList) and block_with_attention:
            return "mlp"
    return "other"


def _role_of_container(leaf: str, module: nn.Module) -> str | None:
    kind = type(module).__name__
    children = {name for name, _ in module.named_children()}
    if leaf == "experts" or kind.endswith("Experts"):
        return "experts"
    if leaf in _ATTENTION_NAMES or "Attention" in kind or any(names <= children for names in _QUERY_KEY_VALUE):
        return "attention"
    if leaf in _MLP_NAMES or "MLP" in kind or "FeedForward" in kind:
        return "mlp"
    return None
