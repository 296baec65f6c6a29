"""Who takes part on a GPU: the floor, full fine-tuning, ours, PEFT, and the published formula of Unsloth."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import peft
import torch
from torch import Tensor, nn

from benchmarks.contenders import Trainee, fused_adamw, loss_at_head
from benchmarks.gpu.models import sharing
from benchmarks.workloads import Batch, Loss
from lightning_lora import LoRAConfig, inject_lora
from lightning_lora.lora.layers.adapted import factor_parameters
from lightning_lora.mixin.optim import parameter_groups

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def unwrapped_loss_at_head(model: nn.Module, batch: Batch) -> Tensor:
    """`loss_at_head`, of the model inside where PEFT has wrapped it."""
    inside: Any = model.base_model.model if isinstance(model, peft.PeftModel) else model
    return loss_at_head(inside, batch)


def floor(base: nn.Module, loss: Loss) -> Trainee:
    model: Any = sharing(base)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    return Trainee(model, None, loss=loss)


def full(base: nn.Module, loss: Loss) -> Trainee:
    model = copy.deepcopy(base).requires_grad_(True)
    return Trainee(model, fused_adamw(model.parameters()), loss=loss)


def ours(base: nn.Module, loss: Loss, rank: int = 16, **settings: Any) -> Trainee:
    model = sharing(base)
    inject_lora(model, LoRAConfig(rank=rank, **settings))
    fill_factors(factor_parameters(model))
    return Trainee(model, fused_adamw(parameter_groups(model, 1e-6)), loss=loss)


def with_peft(base: nn.Module, loss: Loss, rank: int = 16, dropout: float = 0.0, autocast: bool = True) -> Trainee:
    config = peft.LoraConfig(r=rank, lora_alpha=32, lora_dropout=dropout, target_modules=PROJECTIONS)
    wrapped: Any = sharing(base)
    model = peft.get_peft_model(wrapped, config, autocast_adapter_dtype=autocast)
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fill_factors(factors)
    return Trainee(model, fused_adamw(factors.values()), loss=loss)


@torch.no_grad()
def fill_factors(factors: Mapping[str, Tensor]) -> None:
    """Factors as after some training: B is not zero."""
    for name, factor in factors.items():
        factor.normal_(std=0.02 if "lora_B" in name else factor.shape[-1] ** -0.5)


class UnslothFormula(torch.autograd.Function):
    """From the published arithmetic, not from anyone's code: x kept, A x and dY B computed where they are needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        y = rows @ W.T
        y.addmm_(rows @ A.T, B.T, alpha=scale)
        ctx.save_for_backward(rows, W, A, B)
        ctx.scale = scale
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (d_y,), (x, W, A, B), scale = grad_outputs, ctx.saved_tensors, ctx.scale
        rows = d_y.reshape(-1, d_y.shape[-1])
        d_A, d_B = (B.T @ rows.T) @ x * scale, rows.T @ (x @ A.T) * scale
        d_x = (rows @ W).addmm_(rows @ B, A, alpha=scale)
        return d_x.view(*d_y.shape[:-1], -1), None, d_A, d_B, None


class UnslothFormulaLinear(nn.Linear):
    """A linear layer that computes by `UnslothFormula`."""

    A: nn.Parameter
    B: nn.Parameter
    scale: float

    def forward(self, input: Tensor) -> Tensor:
        A, B = self.A.to(input.dtype), self.B.to(input.dtype)
        return UnslothFormula.apply(input, self.weight, A, B, self.scale)


def unsloth_formula(base: nn.Module, loss: Loss, rank: int = 16) -> Trainee:
    model, factors = sharing(base), {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in PROJECTIONS:
            layer.__class__ = UnslothFormulaLinear
            assert isinstance(layer, UnslothFormulaLinear)
            layer.scale = 32 / rank
            layer.A = _factor(rank, layer.in_features, layer)
            layer.B = _factor(layer.out_features, rank, layer)
            factors |= {f"{name}.lora_A": layer.A, f"{name}.lora_B": layer.B}
    fill_factors(factors)
    return Trainee(model, fused_adamw(factors.values()), loss=loss)


def _factor(num_out: int, num_in: int, layer: nn.Linear) -> nn.Parameter:
    return nn.Parameter(torch.empty(num_out, num_in, device=layer.weight.device, dtype=torch.float32))


def launch_step(trainee: Trainee, batch: Batch) -> None:
    """One training step, not waited for."""
    trainee.loss(trainee.model, batch).backward()
    if trainee.optimizer is not None:
        trainee.optimizer.step()
        trainee.optimizer.zero_grad(set_to_none=True)
