"""Weights that no checkpoint holds: a new head beside a pretrained body, or a whole model that was never loaded.

An adapter learns a change of frozen weights. If these were random, no other process can build them again, and the
adapter is worth nothing there. transformers marks what it has loaded from a checkpoint, so that a new head in one of
its models is known. Elsewhere only the values tell: torch's initial values are uniform within ``1 / sqrt(in)``, initial
biases are zero, and norms start at one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_lora.errors import first_five
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.frozen_copies import frozen_copies
from lightning_lora.lora.layers.adapted import join
from lightning_lora.lora.layers.quantised_weights import is_quantised
from lightning_lora.lora.patterns import matches_any, plain_name
from lightning_lora.lora.targets.roles import hugging_face_models, module_roles
from lightning_lora.lora.targets.selection import is_inside

_SAMPLE = 4096


@dataclass(frozen=True)
class NewWeights:
    """What of a module seems to be in no checkpoint.

    Args:
        modules: Outermost modules of which no weight was in the checkpoint that their transformers model was loaded
            from, but for embeddings. They are trained in full, unless the settings name them otherwise.
        known: Names of other layers with weights that were not in that checkpoint.
        likely: Names of layers that have the values of a fresh layer, in models that carry no marks.
        is_base_new: Whether all of a model without marks looks like that.
    """

    modules: dict[str, nn.Module]
    known: tuple[str, ...]
    likely: tuple[str, ...]
    is_base_new: bool


def find_new_weights(root: nn.Module, config: LoRAConfig) -> NewWeights:
    """Find what no checkpoint seems to hold in ``root``; nothing is changed.

    Args:
        config: The settings. What they target by name, exclude or adapt as a head is not trained in full.
    """
    loaded, new, embeddings = _marked(root)
    heads = [name for name, role in module_roles(root).items() if role == "head"] if config.adapt_head else []
    patterns = (*config.exclude, *(() if isinstance(config.targets, str) else config.targets), *heads)
    modules: dict[str, nn.Module] = {}
    for name, module in root.named_modules():
        own = {id(parameter) for parameter in module.parameters()}
        is_new = bool(own) and own <= new and not own & embeddings
        if is_new and not is_inside(name, modules) and not _is_named(name, module, patterns):
            modules[name] = module
    # A frozen copy is as new as what it is a copy of.
    named = (*modules, *_trained(root, config), *frozen_copies(root))
    owners = {name: module for name, module in root.named_modules() if not is_inside(name, named)}
    known = [name for name, module in owners.items() if any(id(p) in new for p in module._parameters.values())]
    plain = {name: module for name, module in owners.items() if not _ids(module) & (loaded | new)}
    judged, likely = _fresh_layers(plain)
    is_base_new = not loaded and len(likely) * 2 > judged
    return NewWeights(modules, tuple(map(plain_name, known)), tuple(map(plain_name, likely)), is_base_new)


def notes(new: NewWeights) -> list[str]:
    """Lines for the start of a run on weights that neither a checkpoint nor the run will hold."""
    lines = []
    if new.is_base_new:
        lines.append(
            f"the base looks freshly initialised ({first_five(new.likely)}) and is not saved with the adapter: build "
            f"it from the same seed or file in every process, or train it with lora=None; if only its head is new, "
            f'trainable=["{new.likely[-1]}"] trains and saves that in full'
        )
    names = new.known if new.is_base_new else (*new.known, *new.likely)
    if names:
        lines.append(
            f"no checkpoint seems to hold {first_five(names)}: the weights are random and frozen, and not saved with "
            f'the adapter; trainable=["{names[0]}"] trains and saves such a layer in full'
        )
    return lines


def _marked(root: nn.Module) -> tuple[set[int], set[int], set[int]]:
    """The ``id`` of parameters that transformers has loaded, has not found in the checkpoint, and of its embeddings."""
    loaded: set[int] = set()
    new: set[int] = set()
    embeddings: set[int] = set()
    for _, model in hugging_face_models(root):
        parameters = {id(p): p for p in model.parameters()}
        found = {key for key, p in parameters.items() if getattr(p, "_is_hf_initialized", False)}
        missing = {key for key, p in parameters.items() if p.is_floating_point() and not is_quantised(p)} - found
        # A model that was built without a checkpoint has no marks, a copy has lost them.
        if sum(parameters[key].numel() for key in missing) < sum(parameters[key].numel() for key in found):
            loaded |= found
            new |= missing
        tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        # A language model's head may be a resized one.
        tables.append(model.get_output_embeddings())  # pyright: ignore[reportCallIssue, reportArgumentType]
        embeddings |= {id(p) for table in tables if table is not None for p in table.parameters()}
    return loaded, new, embeddings


def _is_named(name: str, module: nn.Module, patterns: Collection[str]) -> bool:
    """Whether a pattern matches a module, or a layer inside it."""
    return any(matches_any(join(name, inner).rstrip("."), patterns) for inner, _ in module.named_modules())


def _trained(root: nn.Module, config: LoRAConfig) -> Collection[str]:
    return [name for name, _ in root.named_modules() if name and matches_any(name, config.trainable)]


def _ids(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module._parameters.values()}


def _fresh_layers(layers: Mapping[str, nn.Module]) -> tuple[int, list[str]]:
    """The number of layers with a weight matrix, and the names of those that have the values of a fresh one."""
    weights = {name: weight for name, layer in layers.items() if (weight := _plain_weight(layer)) is not None}
    scales = [weight for weight in weights.values() if weight.ndim < 2]
    are_norms_fresh = bool(scales) and all(bool((_sample(scale) == 1).all()) for scale in scales)
    matrices = {name: weight for name, weight in weights.items() if weight.ndim > 1}
    return len(matrices), [
        name
        for name, weight in matrices.items()
        if _is_fresh(weight, layers[name]._parameters.get("bias")) or (are_norms_fresh and _is_normal(weight))
    ]


def _plain_weight(layer: nn.Module) -> Tensor | None:
    """The weight of a layer if its values can be judged."""
    weight = layer._parameters.get("weight")
    if type(weight) is not nn.Parameter or is_quantised(weight) or isinstance(layer, nn.Embedding):
        return None
    return weight if weight.is_floating_point() and not weight.is_meta else None


def _is_fresh(weight: Tensor, bias: Tensor | None) -> bool:
    return (bias is not None and not bool(bias.detach().any())) or _is_uniform(weight, bias)


def _is_uniform(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the values are uniform within ``1 / sqrt(in)``, as torch draws them."""
    bound = weight.shape[1:].numel() ** -0.5
    sample = _sample(weight) / bound
    if bias is not None and float(bias.detach().float().abs().max()) > 1.001 * bound:
        return False
    # The square of a uniform number has mean 1/3 and variance 4/45.
    spread = 4 * (4 / 45 / len(sample)) ** 0.5
    return float(sample.abs().max()) <= 1.001 and abs(float(sample.square().mean()) - 1 / 3) <= spread


def _is_normal(weight: Tensor) -> bool:
    """Whether the values have the kurtosis of a normal distribution, as the initial values of transformers have."""
    sample = _sample(weight)
    kurtosis = float(sample.pow(4).mean() / sample.square().mean().square())
    return abs(kurtosis - 3) <= 4 * (24 / len(sample)) ** 0.5


def _sample(weight: Tensor) -> Tensor:
    elements = weight.detach().reshape(-1)
    return elements[:: -(-len(elements) // _SAMPLE) or 1].to(torch.float32)
