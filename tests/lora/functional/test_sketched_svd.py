"""Singular vectors of a sum of products, exact where the sum is small, and sketched without forming it elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_lora.lora.functional.sketched_svd import SketchedSVD

CPU = torch.device("cpu")


def products(num_out: int, num_in: int, decay: float) -> tuple[Tensor, Tensor]:
    """``x`` and ``d_y`` whose product has singular values ``1, 2^-decay, 3^-decay, ...``."""
    torch.manual_seed(0)
    count = min(num_out, num_in)
    U, V = (torch.linalg.qr(torch.randn(n, count, dtype=torch.float64))[0] for n in (num_out, num_in))
    values = torch.arange(1, count + 1, dtype=torch.float64) ** -decay
    return V.T.contiguous(), (U * values).T.contiguous()


@pytest.mark.parametrize(("num_out", "num_in"), [(6, 9), (9, 6), (7, 7)])
def test_vectors_of_a_small_sum_are_exact(num_out: int, num_in: int) -> None:
    sketch = SketchedSVD(num_out, num_in, 4, 0, CPU, torch.float64)
    parts = [(torch.randn(2, 3, num_in), torch.randn(2, 3, num_out)) for _ in range(3)]
    for x, d_y in parts:
        sketch.add(x, d_y)
    G = sum((d_y.flatten(0, 1).double().T @ x.flatten(0, 1).double() for x, d_y in parts), torch.zeros(()).double())
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    found = sketch.vectors()
    assert [tensor.shape for tensor in found] == [(num_out, 4), (4,), (4, num_in)]
    torch.testing.assert_close(found[1], S[:4])
    torch.testing.assert_close((found[0] * found[1]) @ found[2], (U[:, :4] * S[:4]) @ Vh[:4])
    assert bool((found[2].gather(1, found[2].abs().argmax(1, keepdim=True)) > 0).all())


@pytest.mark.parametrize(("num_out", "num_in"), [(200, 120), (120, 200)])
def test_a_sketch_holds_nearly_as_much_of_a_large_sum_as_its_best_part_of_that_rank(num_out: int, num_in: int) -> None:
    x, d_y = products(num_out, num_in, decay=1.0)
    sketch = SketchedSVD(num_out, num_in, 6, 3, CPU, torch.float64)
    half = len(x) // 2
    sketch.add(x[:half], d_y[:half])
    sketch.add(x[half:], d_y[half:])
    assert not sketch.is_whole
    U, S, Vh = sketch.vectors()
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(U.T @ U, eye)
    torch.testing.assert_close(Vh @ Vh.T, eye)
    squares = torch.arange(1, half * 2 + 1, dtype=torch.float64) ** -2.0
    error = (d_y.T @ x - (U * S) @ Vh).square().sum()
    assert squares[6:].sum() <= error < 3 * squares[6:].sum()


def test_sketches_of_parts_add_up_to_the_sketch_of_the_whole() -> None:
    x, d_y = products(90, 80, decay=1.0)
    whole, one, other = (SketchedSVD(90, 80, 2, 5, CPU, torch.float64) for _ in range(3))
    whole.add(x, d_y)
    one.add(x[:30], d_y[:30])
    other.add(x[30:], d_y[30:])
    torch.testing.assert_close(one.range + other.range, whole.range)
    torch.testing.assert_close(one.core + other.core, whole.core)


def test_vectors_beyond_the_rank_of_the_sum_are_left_out() -> None:
    sketch = SketchedSVD(8, 9, 6, 0, CPU, torch.float32)
    sketch.add(torch.randn(3, 9), torch.randn(3, 8))
    assert len(sketch.vectors()[1]) == 3
    assert len(SketchedSVD(8, 9, 6, 0, CPU, torch.float32).vectors()[1]) == 0
