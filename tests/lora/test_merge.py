"""Laws of merging and unmerging."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    ConfigError,
    LoRAConfig,
    disable_lora,
    inject_lora,
    load_lora_state_dict,
    lora_layers,
    lora_state_dict,
    merge_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from tests.lora.models import ALL, ROWS, adapted, every_build, output
from tests.support.tiny_models import portrait, wake


@every_build
def test_merging_does_not_change_the_function(name: str) -> None:
    module, inputs = adapted(name)
    before = output(module, inputs)
    with disable_lora(module):
        assert (output(module, inputs) - before).abs().max() > 1e-3
    merge_lora(module)
    torch.testing.assert_close(output(module, inputs), before, rtol=1e-5, atol=1e-5)


@every_build
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_restores_every_bit_even_after_many_cycles(name: str, dtype: torch.dtype) -> None:
    module, inputs = adapted(name)
    module.to(dtype)
    before, function = portrait(module), output(module, inputs)
    for _ in range(50):
        merge_lora(module)
        assert portrait(module)["parameters"] == before["parameters"]
        unmerge_lora(module)
    assert portrait(module) == before
    assert torch.equal(output(module, inputs), function)


def test_a_low_precision_merge_is_the_float32_sum_rounded_once() -> None:
    torch.manual_seed(0)
    module = nn.Linear(64, 48, dtype=torch.bfloat16)
    inject_lora(module, ALL)
    wake(module, size=0.02)
    layer = lora_layers(module)[""]
    weight = module.weight.detach().clone()
    exact = weight.double() + 8 * layer.lora_B.double() @ layer.lora_A.double()
    merge_lora(module)
    assert torch.equal(module.weight, (weight.float() + 8 * (layer.lora_B @ layer.lora_A)).bfloat16())
    # Half a unit in the last place of 8 bits.
    assert ((module.weight.double() - exact).abs() <= exact.abs() * 2.0**-8 * 1.001).all()


def test_a_low_precision_merge_says_what_rounding_took_of_a_small_update() -> None:
    torch.manual_seed(0)
    narrow, wide = nn.Linear(64, 48, dtype=torch.bfloat16), nn.Linear(48, 8)
    module = nn.Sequential(narrow, wide)
    inject_lora(module, LoRAConfig(rank=4))
    wake(module, size=0.003)
    weight, delta = narrow.weight.detach().clone(), lora_layers(module)["0"].weight_delta().detach().double()
    with pytest.warns(UserWarning, match=r"2 layers merged; rounding took at most .*% of an update \(0\)") as caught:
        report = merge_lora(module)
    stored = narrow.weight.detach().double() - weight.double()
    expected = float((stored - delta).norm() / delta.norm())
    assert report.losses == {"0": pytest.approx(expected, rel=1e-3), "1": 0.0}
    assert report.worst > 0.3, "most entries of so small an update vanish"
    assert "merge into float32 weights" in str(caught[0].message)


def test_embedding_and_transposed_deltas_have_the_layout_of_the_weight() -> None:
    module, _ = adapted("mixed")
    for layer in lora_layers(module).values():
        delta = layer.lora_spec.scale * layer.lora_B.detach() @ layer.lora_A.detach()
        expected = delta if isinstance(layer, nn.Linear) else delta.T
        torch.testing.assert_close(layer.weight_delta(), expected, rtol=1e-6, atol=1e-7)


def test_a_scaled_table_merges_exactly() -> None:
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * self.embed_scale

    module = Scaled(11, 8)
    inject_lora(module, LoRAConfig(rank=2, adapt_embeddings=True))
    wake(module, size=1.0)
    before = output(module, ROWS)
    merge_lora(module)
    torch.testing.assert_close(output(module, ROWS), before, rtol=1e-5, atol=1e-4)


def test_a_padding_row_learns_nothing() -> None:
    module, _ = adapted("mixed", awake=False)
    module(ROWS).square().sum().backward()
    grad = lora_layers(module)["table"].lora_A.grad
    assert grad is not None
    assert not grad[:, 0].any()
    assert grad[:, 5].any()


def test_rows_never_looked_up_stay_the_bases() -> None:
    table = nn.Embedding(11, 8)
    inject_lora(table, LoRAConfig(rank=2, adapt_embeddings=True))
    before = table.weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in table.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        table(torch.tensor([1, 2])).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    merge_lora(table)
    changed = (table.weight != before).any(1).nonzero().flatten().tolist()
    assert changed == [1, 2]


def test_merged_twice_or_used_while_merged_is_refused(tmp_path: Path) -> None:
    module, inputs = adapted("mixed")
    with pytest.raises(ConfigError, match="nothing to unmerge"):
        unmerge_lora(module)
    state = {name: tensor.clone() for name, tensor in lora_state_dict(module).items()}
    merge_lora(module)
    before, function = portrait(module), output(module, inputs)
    for operation, words in (
        (merge_lora, "cannot merge twice: 4 layers are merged"),
        (lambda m: load_lora_state_dict(m, state), "cannot load adapters: 4 layers are merged"),
        (lambda m: disable_lora(m).__enter__(), "cannot disable adapters: 4 layers are merged"),
        (lambda m: save_adapter(m, tmp_path / "out"), "cannot save the adapter: 4 layers are merged"),
        (lambda m: inject_lora(m, ALL), "adapted already"),
    ):
        with pytest.raises(ConfigError, match=words):
            operation(module)
        assert portrait(module) == before
        assert torch.equal(output(module, inputs), function)
    assert not list(tmp_path.iterdir())


def test_removing_a_merged_adapter_keeps_the_merged_function() -> None:
    module, inputs = adapted("mixed")
    merge_lora(module)
    merged = output(module, inputs)
    remove_lora(module)
    assert torch.equal(output(module, inputs), merged)
    assert not any("lora" in name for name in module.state_dict())
    inject_lora(module, LoRAConfig(rank=2))
    assert torch.equal(output(module, inputs), merged)


def test_a_module_without_values_is_not_merged() -> None:
    """B24: adapters may be injected on the meta device, as FSDP2 needs; nothing can be computed there."""
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(4, 4))
    inject_lora(module, LoRAConfig(rank=2))
    with pytest.raises(ConfigError, match=r"cannot merge: 1 layers are on the meta device and have no values \(0\)"):
        merge_lora(module)
    assert not any(layer.lora_merged for layer in lora_layers(module).values())
