"""One pass forward and one backward for the batches of several arms; each arm computes its own loss in between."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.study.bank.joining import MASK, CannotJoinError, joined, taken_apart
from lightning_lora.study.bank.joint_layers import Head, joint_layers
from lightning_lora.study.bank.process_state import ProcessState

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_TOLERANCE_BELOW = 5e-2
_NUMBERS = itertools.count()


@dataclass(eq=False)
class Call:
    """A call of the base by one arm.

    Args:
        error: What went wrong for this arm.
        is_alone: Whether the arm must call the module itself.
    """

    root: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any = None
    error: BaseException | None = None
    is_alone: bool = False


class JointPass:
    """A pass of the first arm's module with the rows of all arms.

    What an arm gets is cut off from the graph, so that its loss and its backward pass end there. `backward` then goes
    on with the gradients of several arms at once.

    Args:
        calls: The calls of the arms.
        is_joint: False for one call, by the layers as they are.

    Raises:
        CannotJoinError: If the calls cannot be one, or the module draws random numbers.
    """

    def __init__(self, calls: Sequence[Call], is_joint: bool = True) -> None:
        self.calls = calls
        args, kwargs, self.rows = joined([(call.args, call.kwargs) for call in calls])
        before = ProcessState()
        roots = [call.root for call in calls]
        kind: Any = type(roots[0])
        with joint_layers(roots, self.rows, is_joint) as heads:
            self._output = kind.forward(roots[0], *args, **kwargs)
        if is_joint and before.has_drawn():
            before.restore()
            raise CannotJoinError("its base draws random numbers in training, as dropout does")
        self.shape = tuple(tuple(x.shape) for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        self._heads = heads
        self.number = next(_NUMBERS)
        # Of each arm: parts of the graph, and the tensors that it gets in their places.
        self.pairs: list[list[tuple[Tensor, Tensor]]] = [[] for _ in calls]

    def hand_out(self) -> None:
        """Give each arm its part of the output; what an arm computes in its output layer may fail for it alone."""
        outputs = taken_apart(self._output, self.rows, partial(self._parts, compute=True))
        for call, output in zip(self.calls, outputs, strict=True):
            call.output = output
        self._output = None

    def leaves(self) -> list[list[tuple[Tensor, Tensor]]]:
        """The pairs of each arm, without computing output layers."""
        taken_apart(self._output, self.rows, partial(self._parts, compute=False))
        return self.pairs

    def _parts(self, x: Tensor, compute: bool) -> list[Any]:
        head = next((head for head in self._heads if head.marker is x), None)
        source = x if head is None else head.hidden
        assert source is not None
        leaves = [self._leaf(arm, part) for arm, part in enumerate(self.rows.outputs(source))]
        if head is None or not compute:
            return leaves
        return [self._of_head(arm, head, leaf) for arm, leaf in enumerate(leaves)]

    def _leaf(self, arm: int, part: Tensor) -> Tensor:
        if not part.requires_grad:
            return part
        leaf = part.detach().requires_grad_()
        self.pairs[arm].append((part, leaf))
        return leaf

    def _of_head(self, arm: int, head: Head, leaf: Tensor) -> Any:
        try:
            return head.layers[arm](leaf)
        except Exception as error:  # another arm's output layer knows nothing of it
            self.calls[arm].error = error
            return None


def backward(parts: Sequence[tuple[JointPass, Sequence[int]]], is_last: bool) -> None:
    """Go on with the backward passes of arms, from what they got to their adapters.

    Args:
        parts: Passes in the order in which they were made, and the arms that are at their backward pass.
        is_last: Whether no other arm will come.
    """
    for made, arms in reversed(parts):  # what a pass was given may come from an earlier one
        pairs = [pair for arm in arms for pair in made.pairs[arm] if pair[1].grad is not None]
        if not pairs:
            continue
        tensors, gradients = [part for part, _ in pairs], [leaf.grad for _, leaf in pairs]
        with torch.autocast(tensors[0].device.type, enabled=False):
            torch.autograd.backward(tensors, gradients, retain_graph=not is_last)  # pyright: ignore[reportArgumentType]


def equal_rows(calls: Sequence[Call]) -> list[Call]:
    """The same calls with one row in the place of all, and one token at all its positions.

    They tell a base that looks at several rows, though only where these are alike, such as experts that are full.
    """

    def repeated(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() == 0:
            return x
        has_tokens = x.dim() == 3 or (x.dim() == 2 and not x.is_floating_point())
        first = x.detach()[:1, :1] if has_tokens else x.detach()[:1]
        return first.expand_as(x).contiguous()

    return [
        Call(
            call.root,
            tuple(map(repeated, call.args)),
            {name: x if name == MASK else repeated(x) for name, x in call.kwargs.items()},
        )
        for call in calls
    ]


def difference(made: JointPass) -> str:
    """What differs between a joint pass and the passes of the arms alone; "" if nothing does beyond rounding.

    Outputs and gradients of the adapters are compared, so that a base that looks at several rows at once is found out.
    """
    calls, together = made.calls, made.leaves()
    gradients = torch.autograd.grad(
        _sum([pair for pairs in together for pair in pairs], calls),
        flat := [parameter for call in calls for parameter in _trained(call.root)],
        allow_unused=True,
    )
    found = dict(zip(map(id, flat), gradients, strict=True))
    for call, pairs in zip(calls, together, strict=True):
        alone = JointPass([call], is_joint=False).leaves()[0]
        trained = _trained(call.root)
        expected = torch.autograd.grad(_sum(alone, [call]), trained, allow_unused=True)
        kept = _kept(call)
        outputs = [(kept(one), kept(other)) for (one, _), (other, _) in zip(pairs, alone, strict=True)]
        if any(one.shape != other.shape for one, other in outputs):
            return "its outputs have other shapes than those of an arm alone"
        factors = [(_or_zero(found[id(p)], p), _or_zero(g, p)) for p, g in zip(trained, expected, strict=True)]
        tolerance = _tolerance([one for one, _ in outputs + factors])
        for what, compared in (("outputs", outputs), ("gradients", factors)):
            if (gap := _gap(compared)) > tolerance:
                return f"its {what} differ by {gap:.1e} of their size from those of an arm alone"
    return ""


def _trained(root: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in root.parameters() if parameter.requires_grad]


def _or_zero(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient


def _sum(pairs: Sequence[tuple[Tensor, Tensor]], calls: Sequence[Call]) -> Tensor:
    """A sum in which every position that counts has a weight of its own."""
    total: Any = 0.0
    per_call = len(pairs) // len(calls)
    for place, (part, _) in enumerate(pairs):
        weights = torch.arange(part.numel(), device=part.device).cos().view(part.shape).to(part.dtype)
        total = total + (_kept(calls[place // per_call])(part) * weights).sum()
    return total


def _kept(call: Call) -> Callable[[Tensor], Tensor]:
    """Sets positions to zero that a mask leaves out, where a model may compute anything."""
    mask = call.kwargs.get(MASK)

    def kept(x: Tensor) -> Tensor:
        if not isinstance(mask, Tensor) or mask.dim() != 2 or x.shape[:2] != mask.shape:
            return x
        return x.masked_fill(mask.view(*mask.shape, *(1,) * (x.dim() - 2)) == 0, 0)

    return kept


def _tolerance(tensors: Sequence[Tensor]) -> float:
    if any(torch.is_autocast_enabled(tensor.device.type) for tensor in tensors):
        return _TOLERANCE_BELOW
    return max(_TOLERANCE.get(tensor.dtype, _TOLERANCE_BELOW) for tensor in tensors)


def _gap(compared: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The largest difference as a share of the largest value; 0 if values are not finite."""
    size = max((float(other.detach().abs().max()) for _, other in compared if other.numel()), default=0.0) or 1.0
    gaps = [float((one.detach() - other.detach()).abs().max()) / size for one, other in compared if other.numel()]
    return max((gap for gap in gaps if gap == gap), default=0.0)
