"""The role of each layer in its model: attention, mlp, experts, router, embedding, head, filter, or other.

Roles are read from structure (types, sibling names, shared weights, the base model of a Hugging Face model), not from
a list of model names.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator

from torch import nn

from lightning_lora.errors import LayerError, check_choice
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
    """Set the role of all modules that match a name pattern; it comes before the role that their structure tells.

    Args:
        pattern: A dotted name, a dotted suffix or a glob (see `LoRAConfig`).
        role: One of ``attention, mlp, experts, router, embedding, head, filter, other``.

    Raises:
        ConfigError: If the role is unknown or the pattern is empty.
    """
    check_choice("role", role, ROLES, LayerError)
    if not isinstance(pattern, str) or not pattern:
        raise LayerError(f"register_role needs a non-empty name pattern, got {pattern!r}.")
    _REGISTERED[pattern] = role


def module_roles(root: nn.Module, also: Collection[int] = ()) -> dict[str, str]:
    """Dotted name to role for every layer with weights in ``root``; the name of ``root`` itself is empty.

    Layers that cannot be adapted have a role too.

    Args:
        also: The ``id`` of modules that have a role too, of whatever kind they are.
    """
    modules = dict(root.named_modules())
    heads, patches, containers = _heads(root), _patch_embeddings(root), _Containers()
    roles = {}
    for name, module in modules.items():
        if adapter_kind(module) is None and refusal(module) is None and id(module) not in also:
            continue
        registered = first_match(name, _REGISTERED, "")
        if registered:
            roles[name] = registered
        elif isinstance(module, nn.Embedding):
            roles[name] = "embedding"
        elif isinstance(module, nn.Conv1d) and _is_uncalled(name, modules):
            roles[name] = "filter"
        elif id(module) in heads and id(module) not in patches:
            # For a model without a head, transformers may return the patch embedding as output embedding.
            roles[name] = "head"
        else:
            role = _role_by_place(name, modules, containers)
            roles[name] = "embedding" if role == "other" and id(module) in patches else role
    return roles


def _is_uncalled(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether the parent of a module reads its weight without calling it."""
    parent, _, leaf = name.rpartition(".")
    return leaf in uncalled_children(modules[parent])


def hugging_face_models(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every transformers model in ``root`` that is not inside another one."""
    # If transformers was never imported, no module is one of its models, and it need not be imported here.
    library = sys.modules.get("transformers.modeling_utils")
    if library is None:
        return
    outer: list[str] = []
    for name, module in root.named_modules():
        if isinstance(module, library.PreTrainedModel) and not any(_is_below(name, prefix) for prefix in outer):
            outer.append(name)
            yield name, module


def _is_below(name: str, prefix: str) -> bool:
    return prefix == "" or name.startswith(f"{prefix}.")


def _heads(root: nn.Module) -> set[int]:
    """The ``id`` of every output layer: outside the base of a model, or sharing its weight with an embedding."""
    heads = {id(module) for name, module in root.named_modules() if name.rpartition(".")[2] == "lm_head"}
    # Parameters only: a parametrized weight is a new tensor in each access, which may reuse the id of another.
    owners = [module for module in root.modules() if module._parameters.get("weight") is not None]
    tables = {id(module.weight) for module in owners if isinstance(module, nn.Embedding)}
    heads |= {id(module) for module in owners if isinstance(module, nn.Linear) and id(module.weight) in tables}
    for _, model in hugging_face_models(root):
        heads.add(id(model.get_output_embeddings()))  # pyright: ignore[reportCallIssue]
        # Some models name no base (WhisperForAudioClassification); their heads have known names.
        heads |= {id(layer) for name, child in model.named_children() if name in _HEADS for layer in child.modules()}
        base = model.base_model
        if isinstance(base, nn.Module) and base is not model:
            inside = {id(module) for module in base.modules()}
            heads |= {id(module) for module in model.modules() if id(module) not in inside}
    return heads


def _patch_embeddings(root: nn.Module) -> set[int]:
    """The ``id`` of every layer that embeds pixels or sound, in transformers models only.

    Elsewhere a class with "embedding" in its name may be anything, even a whole network. In transformers it may be a
    network too, but then it contains attention.
    """
    return {
        id(layer)
        for _, model in hugging_face_models(root)
        for module in model.modules()
        if type(module).__name__.endswith(("Embedding", "Embeddings", "PatchEmbed", "PatchEmbedder"))
        and not any(
            _role_of_container(name.rpartition(".")[2], child) == "attention" for name, child in module.named_modules()
        )
        for layer in module.modules()
    }


class _Containers:
    """Roles of the modules around layers. Cached, because a list of blocks is around every layer in them."""

    def __init__(self) -> None:
        self._roles: dict[tuple[str, nn.Module], str | None] = {}
        self._attentions: dict[nn.Module, bool] = {}

    def role(self, leaf: str, module: nn.Module) -> str | None:
        """The role of ``module``, whose name ends in ``leaf``; None if it has none."""
        if (leaf, module) not in self._roles:
            self._roles[leaf, module] = _role_of_container(leaf, module)
        return self._roles[leaf, module]

    def holds_attention(self, module: nn.Module) -> bool:
        """Whether a child of ``module`` is an attention module."""
        if module not in self._attentions:
            children = module.named_children()
            self._attentions[module] = any(self.role(name, child) == "attention" for name, child in children)
        return self._attentions[module]


def _role_by_place(name: str, modules: dict[str, nn.Module], containers: _Containers) -> str:
    """The role of the nearest module around a layer that has one.

    Routers and experts are checked first, since both contain MLPs. In a block that contains attention, all other
    layers are its MLP.
    """
    around = _with_ancestors(name, modules)
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


def _with_ancestors(name: str, modules: dict[str, nn.Module]) -> list[tuple[str, nn.Module, nn.Module | None]]:
    """Last part of the name, module and parent, for the module called ``name`` and all modules around it, outwards."""
    found = []
    while name:
        path, _, leaf = name.rpartition(".")
        found.append((leaf, modules[name], modules[path]))
        name = path
    return [*found, ("", modules[""], None)]


def _role_of_container(leaf: str, module: nn.Module) -> str | None:
    """The role of all layers inside ``module``, whose name ends in ``leaf``; None if it does not tell one."""
    kind = type(module).__name__.lower()
    children = {name for name, _ in module.named_children()}
    if leaf == "experts" or kind.endswith("experts"):
        return "experts"
    # Before attention: MemoryAttentionMLP is an MLP, and so may be a module called "mixer".
    if leaf in _MLP_NAMES or kind.endswith("mlp"):
        return "mlp"
    # State-space mixers and gated delta nets take the place of attention; A_log holds their decay rates.
    if leaf.lower().endswith(_ATTENTION_ENDINGS) or "A_log" in module._parameters:
        return "attention"
    if "attention" in kind and not _holds_attention_and_more(module):
        return "attention"
    if any(names <= children for names in _QUERY_KEY_VALUE):
        return "attention"
    return "mlp" if "mlp" in kind or "feedforward" in kind else None


def _holds_attention_and_more(module: nn.Module) -> bool:
    """Whether ``module`` is a whole block: a MaskedAttentionDecoderLayer holds attention and the linears of an MLP."""
    children = dict(module.named_children())
    has_attention = any(name.lower().endswith(_ATTENTION_ENDINGS) for name in children)
    return has_attention and any(isinstance(child, nn.Linear) for child in children.values())
