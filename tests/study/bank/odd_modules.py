"""Modules that look at the rows of a batch, keep something of them, or compute in ways of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.study.bank.kinds import Task
from tests.support import moe_models, tiny_models


def net(*middle: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(8, 16), *[made() for made in middle], nn.Linear(16, 4))


def conv(*middle: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), *[made() for made in middle], nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )


def llama(**settings: Any) -> Callable[[], nn.Module]:
    return lambda: _without_cache(tiny_models.llama(**settings))


def mixture(name: str) -> Callable[[], nn.Module]:
    return lambda: _without_cache(moe_models.moe(name))


def _without_cache(model: Any) -> Any:
    model.config.use_cache = False
    return model


def recomputing() -> nn.Module:
    model: Any = llama()()
    model.gradient_checkpointing_enable()
    return model


class Watching(nn.Module):
    """Computes something from the rows of a batch, or keeps something of it."""

    def __init__(self, computed: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(16))
        self.calls = 0
        self.generator = torch.Generator().manual_seed(3)
        self.computed = computed

    def forward(self, x: Tensor) -> Tensor:
        return self.computed(self, x)


def watching(computed: Callable[[Any, Tensor], Tensor]) -> Callable[[], nn.Module]:
    return net(lambda: Watching(computed))


def centred(layer: Any, x: Tensor) -> Tensor:
    layer.kept.mul_(0.9).add_(x.detach().mean(0))
    return x - x.mean(0)


def observed(layer: Any, x: Tensor) -> Tensor:
    layer.kept.add_(x.detach().mean(0))
    return x


def counted(layer: Any, x: Tensor) -> Tensor:
    layer.calls += 1
    return x * (1 + 0.1 * layer.calls)


class Experts(nn.Module):
    """Each expert takes so many tokens of a batch, the first ones; none has more in an ordinary batch at share 4."""

    def __init__(self, share: float, **told: float) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.most = lambda count: int(share * count / 4)
        for name, value in told.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 16)
        weight, chosen = self.router(flat).softmax(-1).max(-1)
        out = flat
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero().flatten()[: self.most(len(flat))]
            out = out.index_add(0, mine, expert(flat[mine]) * weight[mine, None])
        return out.view_as(x)


class Chosen(nn.Module):
    """A layer that takes the tokens that count, as one without padding does: in the first batch all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        out = x.clone()
        out[counts] = self.layer(x[counts])
        return out


class Choosing(Task):
    """Of the 20 tokens of a later batch 10 count, or 14: together three for each row."""

    def outputs(self, x: Tensor) -> Tensor:
        counts = torch.ones(x.shape[:2], dtype=torch.bool)
        if self.global_step:
            counts.view(-1)[10 if self.rate == 1e-3 else 14 :] = False
        return self.model(x, counts)


class Recomputed(nn.Module):
    def __init__(self, is_reentrant: bool) -> None:
        super().__init__()
        self.first, self.second, self.is_reentrant = nn.Linear(8, 16), nn.Linear(16, 4), is_reentrant

    def forward(self, x: Tensor) -> Tensor:
        def part(x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

        found = checkpoint(part, x * self.one(), use_reentrant=self.is_reentrant)
        assert isinstance(found, Tensor)
        return found

    def one(self) -> Tensor:
        return torch.ones((), requires_grad=True)  # a reentrant checkpoint has gradients only with it


def compiled(**of_one: bool) -> nn.Module:
    made: Any = net(nn.Tanh)()
    (made[0] if of_one else made).compile(backend="eager")
    return made


def replaced() -> nn.Module:
    made: Any = net(nn.Tanh)()
    plain = made.forward
    made.forward = lambda x: 0.5 * plain(x)
    return made


class Twice(Task):
    """Calls the model again with what it has returned."""

    def outputs(self, x: Tensor) -> Tensor:
        y = self.model(x)
        return self.model(torch.cat([y, x[:, 4:]], 1)) + y.square()


class Penalty(Task):
    def outputs(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        y = self.model(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y + slope[:, :4]


class Manual(Task):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        loss.backward()
        optimizer.step()
        return loss.detach()
