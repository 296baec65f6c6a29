"""Nobody is timed who computes something else: losses and gradients against the plain formula in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from benchmarks.adapters import Adapter, shared_names
from benchmarks.contenders import Trainee
from benchmarks.workloads import Batch, next_token_loss
from lightning_lora import inject_lora
from lightning_lora.lora.layers.adapted import adapted_weights, base_parameter, factor_name
from lightning_lora.lora.layers.experts import LoRAFusedExperts

# What we promise in float32; measured: 1e-6 on every workload.
TOLERANCE = 1e-5


class Reference(NamedTuple):
    """What is right: the loss with and without the adapter, and the gradients by PEFT's names; all float64."""

    loss: float
    base_loss: float
    gradients: Mapping[str, Tensor]


class Check(NamedTuple):
    """Relative errors of a contender: of the loss, and the largest of a factor's gradient (2-norm)."""

    loss: float
    gradient: float

    def passed(self, tolerance: float = TOLERANCE) -> bool:
        """Whether both are within the tolerance; not-a-number is not."""
        return self.loss <= tolerance and self.gradient <= tolerance


def reference(base: nn.Module, adapter: Adapter, batch: Batch) -> Reference:
    """Gradients through ``W + scale * B A``, formed in full, in float64; no adapted layer takes part."""
    plain, adapted = copy.deepcopy(base).double().requires_grad_(False), copy.deepcopy(base)
    if isinstance(plain, PreTrainedModel):
        # Grouped products know no float64.
        plain.set_experts_implementation("eager")
    base_loss = float(next_token_loss(plain, batch))
    inject_lora(adapted, adapter.config)
    factors = {name: tensor.double().requires_grad_() for name, tensor in adapter.factors.items()}
    weights = {}
    for name, (layer, weight) in adapted_weights(adapted).items():
        A, B = (factors[factor_name(name, layer, weight, end)] for end in ("lora_A", "lora_B"))
        delta = adapter.scales[name] * B @ A
        is_transposed = isinstance(layer, LoRAFusedExperts) and layer.transposed(layer)
        parameter = base_parameter(name, layer, weight)
        weights[parameter] = plain.get_parameter(parameter) + (delta.mT if is_transposed else delta)
    loss = next_token_loss(lambda input_ids: functional_call(plain, weights, (input_ids,)), batch)
    gradients = dict(zip(factors, torch.autograd.grad(loss, list(factors.values())), strict=True))
    return Reference(float(loss.detach()), base_loss, shared_names(adapted, gradients))


def check(trainee: Trainee, batch: Batch, right: Reference) -> Check:
    """Errors of one forward and backward, in eval mode: dropout off."""
    trainee.model.eval()
    loss = trainee.loss(trainee.model, batch)
    loss.backward()
    expected = right.base_loss if trainee.gradients is None else right.loss
    loss_error = abs(float(loss.detach()) - expected) / abs(expected)
    if trainee.gradients is None:
        return Check(loss_error, 0.0)
    found = trainee.gradients()
    if found.keys() != right.gradients.keys():
        odd = sorted(found.keys() ^ right.gradients.keys())
        raise ValueError(f"{len(odd)} factors are not the adapter's or are missing, the first is {odd[0]!r}.")
    errors = [float((found[name].double() - g).norm() / g.norm()) for name, g in right.gradients.items()]
    trainee.model.zero_grad(set_to_none=True)
    return Check(loss_error, max(errors))
