"""Log-probabilities of tokens out of an output layer, compared with ``log_softmax`` of all logits."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.memory import peak_on_cpu
from lightning_lora import ConfigError, DataError
from lightning_lora.tasks import head_chunks
from lightning_lora.tasks.rl.functional.head_logprobs import head_logprobs, logprobs_of_logits
from tests.tasks.test_head_loss import DIM, PARTS, ROWS, TOKENS, VOCAB, Largest, inputs


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last of them short."""
    monkeypatch.setattr(head_chunks, "CHUNK_ROWS", 4)


def drawn() -> tuple[Tensor, Tensor]:
    """Ids, and a mask of which the first row has nothing."""
    mask = torch.rand(ROWS, TOKENS) < 0.6
    mask[0] = False
    return torch.randint(VOCAB, (ROWS, TOKENS)), mask


def fused(given: dict[str, Tensor], ids: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    update = (given["inner"], given["B"]) if "B" in given else None
    arguments = given["hidden"], given["weight"], ids, mask, given.get("bias")
    return head_logprobs(*arguments, update=update, temperature=temperature)


def plain(given: dict[str, Tensor], ids: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = F.linear(given["hidden"], given["weight"], given.get("bias"))
    logits = logits + given["inner"] @ given["B"].T if "B" in given else logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    everything = torch.distributions.Categorical(logits=wide)
    return everything.log_prob(ids) * mask, everything.entropy() * mask


def gradients(outputs: tuple[Tensor, Tensor], factors: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
    total = sum((output * factor).sum() for output, factor in zip(outputs, factors, strict=True))
    trained = [name for name, tensor in given.items() if tensor.requires_grad]
    assert isinstance(total, Tensor)
    return dict(zip(trained, torch.autograd.grad(total, [given[name] for name in trained]), strict=True))


@pytest.mark.parametrize(("used", "trained"), PARTS.values(), ids=PARTS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_log_softmax(
    used: tuple[str, ...], trained: tuple[str, ...], dtype: torch.dtype, rtol: float, temperature: float
) -> None:
    made, (ids, mask) = inputs(dtype, **dict.fromkeys(trained, True)), drawn()
    given = {name: made[name] for name in used}
    ours, theirs = (way(given, ids, mask, temperature) for way in (fused, plain))
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
    assert not ours[0][0].any()
    # Log-probabilities alone, entropies alone, and both.
    for both in ([1.0, 0.0], [0.0, 1.0], [0.7, 1.3]):
        factors = torch.randn(2, ROWS, TOKENS, dtype=dtype) * torch.tensor(both, dtype=dtype)[:, None, None]
        found, expected = (gradients(way(given, ids, mask, temperature), factors, given) for way in (fused, plain))
        for name in trained:
            torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=10 * rtol)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_oracle_of_temperature(temperature: float) -> None:
    """Logits 2, 1, 0, -1: numbers computed by hand in float64."""
    weight, hidden = torch.tensor([[2.0], [1], [0], [-1]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    logprobs, entropy = head_logprobs(hidden, weight, torch.tensor([0]), temperature=temperature)
    expected = {1.0: (-0.4401896986, 0.9475369640), 0.7: (-0.2706738307, 0.7020279765)}[temperature]
    assert (float(logprobs), float(entropy)) == pytest.approx(expected, abs=1e-9)


def test_logits_give_the_same() -> None:
    given, (ids, mask) = inputs(), drawn()
    logits = given["hidden"] @ given["weight"].T + given["bias"] + given["inner"] @ given["B"].T
    torch.testing.assert_close(logprobs_of_logits(logits, ids, mask, 0.7), fused(given, ids, mask, 0.7))


def test_without_gradients_and_compiled_it_is_the_same() -> None:
    given, (ids, mask) = inputs(hidden=True), drawn()
    usual = fused(given, ids, mask, 0.7)
    with torch.no_grad():
        torch.testing.assert_close(fused(given, ids, mask, 0.7), usual, rtol=0, atol=0)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(given, ids, mask, 0.7), usual)


@pytest.mark.parametrize("autocast", [True, False])
def test_low_precision_is_widened_before_the_softmax(autocast: bool) -> None:
    made, (ids, mask) = inputs(torch.float32 if autocast else torch.bfloat16, hidden=True), drawn()
    given = {name: made[name] for name in ("hidden", "weight", "bias")}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = (way(given, ids, mask, 0.7) for way in (fused, plain))
    assert ours[0].dtype is ours[1].dtype is torch.float32
    torch.testing.assert_close(ours, theirs, rtol=3e-2 if autocast else 1e-5, atol=3e-2 if autocast else 1e-5)
    factors = torch.randn(2, ROWS, TOKENS)
    (found,), (expected,) = (gradients(each, factors, given).values() for each in (ours, theirs))
    assert found.dtype is given["hidden"].dtype
    assert (found - expected).norm() <= 0.02 * expected.norm()


def test_a_hopeless_and_a_certain_token_lose_no_digits() -> None:
    hidden, weight = torch.tensor([[300.0], [300.0]], requires_grad=True), torch.tensor([[-1.0], [1.0]])
    logprobs, entropy = head_logprobs(hidden, weight, torch.tensor([0, 1]))
    assert logprobs.tolist() == [-600.0, 0.0]
    assert entropy.tolist() == [0.0, 0.0]
    (gradient,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), hidden)
    assert gradient.tolist() == [[-2.0], [0.0]]


def test_logits_of_all_tokens_are_never_held() -> None:
    tokens, vocab = 64, 50
    hidden, weight = torch.randn(tokens, DIM, requires_grad=True), torch.randn(vocab, DIM)
    with Largest() as ours:
        logprobs, entropy = head_logprobs(hidden, weight, torch.randint(vocab, (tokens,)))
        (logprobs + entropy).sum().backward()
    assert ours.numel == max(4 * vocab, tokens * DIM)


def test_peak_memory_at_a_vocabulary_of_32_thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # chunks of the usual size
    hidden, weight = torch.randn(1, 2048, 8, requires_grad=True), torch.randn(32_000, 8)
    ids = torch.randint(32_000, (1, 2048))

    def ours() -> None:
        head_logprobs(hidden, weight, ids).logprobs.sum().backward()

    def usual() -> None:
        F.linear(hidden, weight).log_softmax(-1).gather(-1, ids[..., None]).sum().backward()

    assert peak_on_cpu(ours) <= 0.35 * peak_on_cpu(usual)


def test_no_token_at_all() -> None:
    given = inputs(hidden=True)
    outputs = fused(given, torch.zeros(ROWS, TOKENS, dtype=torch.long), torch.zeros(ROWS, TOKENS), 1.0)
    assert not outputs[0].any()
    assert not gradients(outputs, torch.ones(2, ROWS, TOKENS), given)["hidden"].any()


def test_bad_input_is_named() -> None:
    given, (ids, mask) = inputs(hidden=True), drawn()
    with pytest.raises(ConfigError, match="temperature must be above 0 to score tokens, got 0"):
        fused(given, ids, mask, 0)
    ids[1, 2], mask[1, 2] = VOCAB, True
    with pytest.raises(DataError, match="label 11 is outside the 11 classes of the head"):
        fused(given, ids, mask, 1.0)


def test_a_second_derivative_is_refused() -> None:
    given: dict[str, Any] = inputs(hidden=True)
    logprobs, _ = fused(given, *drawn(), 1.0)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(logprobs.sum(), given["hidden"], create_graph=True)


def test_the_example_runs() -> None:
    failed, tried = doctest.testmod(importlib.import_module("lightning_lora.tasks.rl.functional.head_logprobs"))
    assert tried
    assert not failed


@pytest.mark.parametrize(("dtype", "chunks"), [(torch.float32, 2), (torch.bfloat16, 2.5)])
def test_what_a_chunk_needs_is_gone_before_the_next(
    dtype: torch.dtype, chunks: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and their exponentials in float32; logits in bfloat16 are half as large, and come on top."""
    monkeypatch.setattr(head_chunks, "CHUNK_ROWS", rows := 64)
    hidden, weight = torch.randn(3 * rows, 8).to(dtype).requires_grad_(), torch.randn(1000, 8).to(dtype)
    ids = torch.zeros(len(hidden), dtype=torch.long)
    most = (chunks + 0.2) * 4 * rows * len(weight)
    assert peak_on_cpu(lambda: head_logprobs(hidden, weight, ids)) < most
    found = head_logprobs(hidden, weight, ids)
    loss = found.logprobs.sum() + found.entropy.sum()
    assert peak_on_cpu(loss.backward) < most
