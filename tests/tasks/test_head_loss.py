"""Output layer and cross-entropy in one function, compared with the two functions."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lightning_lora import DataError
from lightning_lora.tasks import head_chunks
from lightning_lora.tasks.head_loss import head_loss, head_scores

ROWS, TOKENS, DIM, VOCAB, RANK = 3, 7, 6, 11, 2


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last of them short."""
    monkeypatch.setattr(head_chunks, "CHUNK_ROWS", 4)


def inputs(dtype: torch.dtype = torch.float64, **trained: bool) -> dict[str, Tensor]:
    shapes = {
        "hidden": (ROWS, TOKENS, DIM), "weight": (VOCAB, DIM), "bias": (VOCAB,),
        "inner": (ROWS, TOKENS, RANK), "B": (VOCAB, RANK),
    }  # fmt: skip
    return {
        name: torch.randn(shape).to(dtype).requires_grad_(trained.get(name, False)) for name, shape in shapes.items()
    }


def labels(share: float = 0.6) -> Tensor:
    drawn = torch.randint(VOCAB, (ROWS, TOKENS))
    return drawn.where(torch.rand(ROWS, TOKENS) < share, -100)


def plain(target: Tensor, hidden: Tensor, weight: Tensor, bias: Any = None, inner: Any = None, B: Any = None) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    logits = logits if inner is None else logits + inner @ B.T
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide).flatten(0, -2), target.flatten(), ignore_index=-100, reduction="sum")


def fused(target: Tensor, hidden: Tensor, weight: Tensor, bias: Any = None, inner: Any = None, B: Any = None) -> Tensor:
    return head_loss(hidden, weight, target, bias, update=None if inner is None else (inner, B))


def gradients(loss: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
    trained = [name for name, tensor in given.items() if tensor.requires_grad]
    return dict(zip(trained, torch.autograd.grad(loss * 0.5, [given[name] for name in trained]), strict=True))


PARTS = {
    "frozen": (("hidden", "weight"), ("hidden",)),
    "frozen with bias": (("hidden", "weight", "bias"), ("hidden",)),
    "trained": (("hidden", "weight", "bias"), ("hidden", "weight", "bias")),
    "weight alone": (("hidden", "weight"), ("weight",)),
    "adapted": (("hidden", "weight", "bias", "inner", "B"), ("hidden", "inner", "B")),
    "only B": (("hidden", "weight", "inner", "B"), ("B",)),
    "all": (("hidden", "weight", "bias", "inner", "B"), ("hidden", "weight", "bias", "inner", "B")),
}


@pytest.mark.parametrize(("used", "trained"), PARTS.values(), ids=PARTS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_loss_and_gradients_are_those_of_linear_and_cross_entropy(
    used: tuple[str, ...], trained: tuple[str, ...], dtype: torch.dtype, rtol: float
) -> None:
    made, target = inputs(dtype, **dict.fromkeys(trained, True)), labels()
    given = {name: made[name] for name in used}
    ours, theirs = fused(target, **given), plain(target, **given)
    torch.testing.assert_close(ours, theirs, rtol=rtol / 10, atol=0)
    expected = gradients(theirs, given)
    found = gradients(ours, given)
    assert found.keys() == expected.keys() == set(trained)
    for name in trained:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("used", [("hidden", "weight"), ("hidden", "weight", "bias", "inner", "B")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_factors_multiply_the_losses_of_rows(used: tuple[str, ...], dtype: torch.dtype) -> None:
    made, target = inputs(dtype, **dict.fromkeys(used, True)), labels()
    given, factors = {name: made[name] for name in used}, torch.rand(ROWS, TOKENS) * 3
    update = (made["inner"], made["B"]) if "B" in used else None
    ours = head_loss(made["hidden"], made["weight"], target, given.get("bias"), update=update, factors=factors)
    rows = [
        plain(target.where(torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) == row, -100), **given) * float(factor)
        for row, factor in enumerate(factors.flatten())
    ]
    theirs, rtol = torch.stack(rows).sum(), 1e-6 if dtype is torch.float64 else 1e-4
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
    expected, found = gradients(theirs, given), gradients(ours, given)
    for name in used:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=rtol)
    arguments = (made["hidden"], made["weight"], target, given.get("bias"))
    with torch.no_grad():
        torch.testing.assert_close(head_loss(*arguments, update=update, factors=factors), ours)
    compiled = torch.compile(head_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments, update=update, factors=factors), ours)


def test_gradient_is_probability_minus_label_times_weight() -> None:
    given, target = inputs(hidden=True), labels()
    (found,) = torch.autograd.grad(head_loss(given["hidden"], given["weight"], target), given["hidden"])
    probabilities = torch.softmax(given["hidden"].detach() @ given["weight"].T, -1)
    by_logits = probabilities - F.one_hot(target.clamp(min=0), VOCAB)
    torch.testing.assert_close(found, (by_logits * (target != -100)[..., None]) @ given["weight"])


def test_a_hopeless_and_a_certain_row_lose_no_digits() -> None:
    """The probability of the label vanishes in one row and is 1 in the other."""
    hidden, weight = torch.tensor([[300.0], [300.0]], requires_grad=True), torch.tensor([[-1.0], [1.0]])
    loss = head_loss(hidden, weight, torch.tensor([0, 1]))
    assert float(loss.detach()) == 600.0
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[2.0], [0.0]]


def test_the_loss_of_low_precision_scores_is_made_in_float32() -> None:
    made, target = inputs(torch.bfloat16, hidden=True), labels()
    given = {name: made[name] for name in ("hidden", "weight", "bias")}
    ours, theirs = fused(target, **given), plain(target, **given)
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    (found,), (expected,) = (gradients(loss, given).values() for loss in (ours, theirs))
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in given.items()}
    (true, *_) = gradients(plain(target, **exact), exact).values()
    assert found.dtype is torch.bfloat16
    assert (found - true).norm() <= 1.05 * (expected - true).norm() + 1e-6


def test_autocast_computes_as_it_does_for_linear_and_cross_entropy() -> None:
    made, target = inputs(torch.float32, hidden=True, weight=True, B=True), labels()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fused(target, **made), plain(target, **made)
        assert head_scores(made["hidden"], made["weight"], target).losses.dtype is torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=0)
    expected, found = gradients(theirs, made), gradients(ours, made)
    for name in ("hidden", "weight", "B"):
        assert found[name].dtype is torch.float32
        torch.testing.assert_close(found[name], expected[name], rtol=3e-2, atol=3e-2)


def test_divisor_divides_and_zero_counts_as_one() -> None:
    given, target = inputs(), labels()
    loss = head_loss(given["hidden"], given["weight"], target)
    torch.testing.assert_close(head_loss(given["hidden"], given["weight"], target, divisor=4), loss / 4)
    for none in (0, torch.tensor(0)):
        torch.testing.assert_close(head_loss(given["hidden"], given["weight"], target, divisor=none), loss)


def test_without_a_label_loss_and_gradients_are_zero() -> None:
    given = inputs(hidden=True, weight=True, bias=True, inner=True, B=True)
    target = torch.full((ROWS, TOKENS), -100)
    loss = fused(target, **given)
    assert float(loss.detach()) == 0.0
    for name, gradient in gradients(loss, given).items():
        assert gradient.shape == given[name].shape
        assert not gradient.any()
    scores = head_scores(given["hidden"], given["weight"], target)
    assert not scores.losses.any()
    assert not scores.correct.any()


@pytest.mark.parametrize("label", [VOCAB, -1, -101])
def test_a_label_that_is_no_class_is_named(label: int) -> None:
    given, target = inputs(hidden=True), labels()
    target[1, 2] = label
    with pytest.raises(DataError, match=rf"label {label} is outside the 11 classes of the head: .* in \[0, 11\)"):
        head_loss(given["hidden"], given["weight"], target)


def test_labels_of_another_shape_are_refused() -> None:
    given = inputs()
    with pytest.raises(DataError, match=r"the hidden states are \(3, 7, 6\), the labels are \(3, 6\)"):
        head_loss(given["hidden"], given["weight"], labels()[:, :-1])


def test_scores_are_the_losses_and_hits_of_every_token() -> None:
    given, target = inputs(), labels()
    logits = plain_logits = given["hidden"] @ given["weight"].T + given["bias"] + given["inner"] @ given["B"].T
    target[0, 0] = logits[0, 0].argmax()  # at least one is right
    losses, correct = head_scores(
        given["hidden"], given["weight"], target, given["bias"], update=(given["inner"], given["B"])
    )
    expected = F.cross_entropy(plain_logits.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="none")
    torch.testing.assert_close(losses, expected.view_as(target))
    assert torch.equal(correct, logits.argmax(-1) == target)
    assert correct.any()


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *made])
        return out


def test_scores_of_all_tokens_are_never_held() -> None:
    tokens, vocab, dim = 64, 50, 3
    hidden, weight = torch.randn(tokens, dim, requires_grad=True), torch.randn(vocab, dim)
    target = torch.randint(vocab, (tokens,))
    with Largest() as usual:
        plain(target, hidden, weight).backward()
    with Largest() as ours:
        head_loss(hidden, weight, target).backward()
        head_scores(hidden, weight, target)
    assert usual.numel == tokens * vocab
    assert ours.numel == max(4 * vocab, tokens * dim)


@pytest.mark.parametrize("supervised", [0, 1, 10, ROWS * TOKENS])
def test_rows_without_a_label_cost_no_product(supervised: int) -> None:
    given = inputs(torch.float32, hidden=True)
    target = torch.full((ROWS * TOKENS,), -100)
    target[torch.randperm(ROWS * TOKENS)[:supervised]] = 1
    with FlopCounterMode(display=False) as counter:
        head_loss(given["hidden"], given["weight"], target.view(ROWS, TOKENS)).backward()
    # Scores and the gradient of the hidden states; none for the frozen weight.
    assert counter.get_total_flops() == 2 * (2 * supervised * DIM * VOCAB)


def test_gradients_are_only_made_where_they_are_wanted() -> None:
    given, target = inputs(torch.float32, hidden=True), labels(1.0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss = head_loss(given["hidden"], given["weight"], target)
    assert not loss.requires_grad
    assert counter.get_total_flops() == 2 * ROWS * TOKENS * DIM * VOCAB


def test_backward_can_be_repeated() -> None:
    given, target = inputs(hidden=True, weight=True), labels()
    loss = head_loss(given["hidden"], given["weight"], target)
    once = torch.autograd.grad(loss, [given["hidden"], given["weight"]], retain_graph=True)
    twice = torch.autograd.grad(2 * loss, [given["hidden"], given["weight"]])
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(2 * a, b)


def test_a_second_derivative_is_refused() -> None:
    given = inputs(hidden=True)
    loss = head_loss(given["hidden"], given["weight"], labels())
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(loss, given["hidden"], create_graph=True)


def test_transforms_of_functions_get_the_plain_formula() -> None:
    given, target = inputs(), labels()
    found = torch.func.grad(lambda hidden: head_loss(hidden, given["weight"], target))(given["hidden"])
    hidden = given["hidden"].requires_grad_()
    (expected,) = torch.autograd.grad(plain(target, hidden, given["weight"]), hidden)
    torch.testing.assert_close(found, expected)


def test_compiling_gives_one_graph_with_the_plain_formula() -> None:
    given, target = inputs(hidden=True), labels()
    compiled = torch.compile(head_loss, fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(given["hidden"], given["weight"], target), plain(target, given["hidden"], given["weight"])
    torch.testing.assert_close(ours, theirs)
    (found,), (expected,) = (torch.autograd.grad(loss, given["hidden"]) for loss in (ours, theirs))
    torch.testing.assert_close(found, expected)


def test_the_example_runs() -> None:
    failed, tried = doctest.testmod(importlib.import_module("lightning_lora.tasks.head_loss"))
    assert tried
    assert not failed
