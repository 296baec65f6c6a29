"""Updates cut to half of their rank are the best approximation of that rank, and factors return bit for bit."""

from __future__ import annotations

import pytest
import torch

from lightning_lora import LoRAConfig, inject_lora
from lightning_lora.capacity.half_rank import cut_adapters, cut_factors
from lightning_lora.capacity.layer_groups import spectra
from lightning_lora.lora.layers.adapted import lora_layers
from tests.support import toys


@pytest.mark.parametrize("experts", [(), (3,)])
@pytest.mark.parametrize("keep", [0, 1, 2, 5])
def test_cut_factors_are_the_truncated_product(experts: tuple[int, ...], keep: int) -> None:
    torch.manual_seed(0)
    A, B = torch.randn(*experts, 5, 9, dtype=torch.float64), torch.randn(*experts, 7, 5, dtype=torch.float64)
    U, S, V = torch.linalg.svd(B @ A, full_matrices=False)
    best = U[..., :keep] @ torch.diag_embed(S[..., :keep]) @ V[..., :keep, :]
    cut_A, cut_B = cut_factors(A, B, keep)
    assert (cut_A.shape, cut_B.shape) == (A.shape, B.shape)
    torch.testing.assert_close(cut_B @ cut_A, best)


def test_factors_return_bit_for_bit_in_the_same_memory() -> None:
    net = toys.Net()
    inject_lora(net, LoRAConfig(rank=2))
    for layer in lora_layers(net).values():
        torch.nn.init.normal_(layer.lora_B)
    before, places = toys.snapshot(net), [p.data_ptr() for p in net.parameters()]
    x = torch.randn(3, 4)
    whole = net(x)
    with cut_adapters(net, {"first": 1, "second": 0}):
        assert not torch.equal(net(x), whole)
    assert toys.same(toys.snapshot(net), before)
    assert [p.data_ptr() for p in net.parameters()] == places


def test_spectra_of_a_known_update_and_of_none() -> None:
    net = toys.Net()
    inject_lora(net, LoRAConfig(rank=2))
    layer = lora_layers(net)["first"]
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(4)[:2])
        layer.lora_B.copy_(torch.eye(8)[:, :2] * torch.tensor([2.0, 1.0]))
    found = spectra(net, ["first"])
    assert found["stable_rank"] == pytest.approx(5 / 4)
    shares = torch.tensor([2 / 3, 1 / 3], dtype=torch.float64)
    assert found["effective_rank"] == pytest.approx(float((-(shares * shares.log()).sum()).exp()))
    assert spectra(net, ["second"]) == {"rank": 2.0, "stable_rank": 0.0, "effective_rank": 0.0}
