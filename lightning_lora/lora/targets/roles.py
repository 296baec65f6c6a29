"""What each layer is in its model: attention, mlp, experts, router, embedding, head, filter, or other.

Roles are read from structure (types, sibling names, weight tying, the Hugging Face base model), not from a list of
model names.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn

from lightning_lora.errors import ConfigError
from lightning_lora.lora.layers.registry import adapter_kind, refusal
from lightning_lora.lora.patterns import first_match
from lightning_lora.lora.targets.uncalled_layers import uncalled_children

ROLES = ("attention", "mlp", "experts", "router", "embedding", "head", "filter", "other")

_ATTENTION_ENDINGS = ("attn", "attention", "mixer")
_HEADS = frozenset({"classifier", "qa_outputs", "score"})
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
        role: One of ``attention, mlp, experts, router, embedding, head, filter, other``.

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
    heads, patches, containers = _heads(root), _patch_embeddings(root), _Containers()
    roles = {}
    for name, module in modules.items():
        if adapter_kind(module) is None and refusal(module) is None:
            continue
        registered = first_match(name, _REGISTERED, "")
        if registered:
            roles[name] = registered
        elif isinstance(module, nn.Embedding):
            roles[name] = "embedding"
        elif isinstance(module, nn.Conv1d) and _is_uncalled(name, modules):
            roles[name] = "filter"
        elif id(module) in heads and id(module) not in patches:
            # A model without a head calls its patch embedding its output, by transformers' fallback.
            roles[name] = "head"
        else:
            role = _role_by_place(name, modules, containers)
            roles[name] = "embedding" if role == "other" and id(module) in patches else role
    return roles


def _is_uncalled(name: str, modules: dict[str, nn.Module]) -> bool:
    parent, _, leaf = name.rpartition(".")
    return leaf in uncalled_children(modules[parent])


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
        # Where the base cannot be told, as in WhisperForAudioClassification, the names of its heads can.
        heads |= {id(layer) for name, child in model.named_children() if name in _HEADS for layer in child.modules()}
        base = model.base_model
        if isinstance(base, nn.Module) and base is not model:
            inside = {id(module) for module in base.modules()}
            heads |= {id(module) for module in model.modules() if id(module) not in inside}
    return heads


def _patch_embeddings(root: nn.Module) -> set[int]:
    """Identities of what embeds pixels or sound in transformers models: convolutions and linears, but no tables.

    Elsewhere a class that has "embedding" in its name may be anything, a whole network included; in transformers, a
    network with attention in it.
    """
    return {
        id(layer)
        for _, model in hugging_face_models(root)
        for module in model.modules()
        if type(module).__name__.endswith(("Embedding", "Embeddings", "PatchEmbed", "PatchEmbedder"))
        and not any(_role_of_container(name, child) == "attention" for name, child in _named_by_leaf(module))
        for layer in module.modules()
    }


def _named_by_leaf(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name.rpartition(".")[2], child) for name, child in module.named_modules())


class _Containers:
    """What modules are as surroundings of layers, each told once: a list of blocks is around every layer in them."""

    def __init__(self) -> None:
        self._roles: dict[tuple[str, nn.Module], str | None] = {}
        self._attentions: dict[nn.Module, bool] = {}

    def role(self, leaf: str, module: nn.Module) -> str | None:
        """The role of a module called ``leaf``, if it has one."""
        if (leaf, module) not in self._roles:
            self._roles[leaf, module] = _role_of_container(leaf, module)
        return self._roles[leaf, module]

    def holds_attention(self, module: nn.Module) -> bool:
        """Whether one of its children is an attention."""
        if module not in self._attentions:
            children = module.named_children()
            self._attentions[module] = any(self.role(name, child) == "attention" for name, child in children)
        return self._attentions[module]


def _role_by_place(name: str, modules: dict[str, nn.Module], containers: _Containers) -> str:
    """The role of the nearest ancestor that has one; the rest of a block with attention in it is its MLP.

    Routers and experts are made of MLPs: what is around those tells first.
    """
    around = _ancestors(name, modules)
    for leaf, _, parent in around:
        if leaf in ("router", "gate", "shared_expert_gate") and hasattr(parent, "experts"):
            return "router"
    roles = [containers.role(leaf, module) for leaf, module, _ in around]
    if "experts" in roles:
        return "experts"
    block_with_attention = False
    for role, (_, module, _) in zip(roles, around, strict=True):
        if role:
            return role
        block_with_attention = block_with_attention or containers.holds_attention(module)
        if isinstance(module, nn.ModuleList) and block_with_attention:
            return "mlp"
    return "other"


def _ancestors(name: str, modules: dict[str, nn.Module]) -> list[tuple[str, nn.Module, nn.Module | None]]:
    """Of the module called ``name`` and all around it, outwards: last part of the name, the module, its parent."""
    found = []
    while name:
        path, _, leaf = name.rpartition(".")
        found.append((leaf, modules[name], modules[path]))
        name = path
    return [*found, ("", modules[""], None)]


def _role_of_container(leaf: str, module: nn.Module) -> str | None:
    kind = type(module).__name__.lower()
    children = {name for name, _ in module.named_children()}
    if leaf == "experts" or kind.endswith("experts"):
        return "experts"
    # MemoryAttentionMLP is an MLP; a mixer may be one.
    if leaf in _MLP_NAMES or kind.endswith("mlp"):
        return "mlp"
    # State-space mixers and gated delta nets stand where attention does; they hold their decay rates.
    if leaf.lower().endswith(_ATTENTION_ENDINGS) or "A_log" in module._parameters:
        return "attention"
    if "attention" in kind and not _holds_attention_and_more(module):
        return "attention"
    if any(names <= children for names in _QUERY_KEY_VALUE):
        return "attention"
    return "mlp" if "mlp" in kind or "feedforward" in kind else None


def _holds_attention_and_more(module: nn.Module) -> bool:
    """Whether it is a block: a MaskedAttentionDecoderLayer has attention beside the linears of its MLP."""
    children = dict(module.named_children())
    has_attention = any(name.lower().endswith(_ATTENTION_ENDINGS) for name in children)
    return has_attention and any(isinstance(child, nn.Linear) for child in children.values())
