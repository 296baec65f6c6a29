"""Laws of putting adapters in, folding them in, switching them off and taking them off."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    AdapterFileError,
    ConfigError,
    LoRAConfig,
    LoRAError,
    count_parameters,
    disable_lora,
    inject_lora,
    load_lora_state_dict,
    lora_layers,
    lora_state_dict,
    merge_lora,
    register_layer,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.lora.layers import LoRAEmbedding, LoRALayer, LoRALinear
from tests.support import toys
from tests.support.tiny_models import TOKENS, Net, gpt2, llama, logits, loss, mlp, portrait, state_bytes, wake

ALL = LoRAConfig(rank=4)
WITH_TABLES = LoRAConfig(rank=4, adapt_head=True, adapt_embeddings=True)


class Doubled(nn.Linear):
    """A user's layer, found by pickle because it has a module of its own."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(num_in, num_out)
        self.calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(input)


class Mixed(nn.Module):
    """Every kind of layer that has an adapter, the user's own included."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8, padding_idx=0)
        self.own = Doubled(8, 6)
        self.transposed = Conv1D(5, 6)
        self.plain = nn.Linear(5, 3)

    def forward(self, rows: Tensor) -> Tensor:
        return self.plain(torch.tanh(self.transposed(torch.tanh(self.own(self.table(rows))))))


ROWS = torch.tensor([[0, 1, 5, 10], [3, 3, 0, 9]])
BUILDS: dict[str, tuple[Callable[[], nn.Module], Tensor, LoRAConfig]] = {
    "llama": (llama, TOKENS, WITH_TABLES),
    "gpt2": (gpt2, TOKENS, ALL),
    "mixed": (Mixed, ROWS, LoRAConfig(rank=2, adapt_embeddings=True)),
    "rslora": (Mixed, ROWS, LoRAConfig(rank=2, adapt_embeddings=True, scaling="rslora", rank_pattern={"plain": 3})),
}
every_build = pytest.mark.parametrize("name", BUILDS)


def adapted(name: str, awake: bool = True) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, inputs, config = BUILDS[name]
    module = build().eval()
    inject_lora(module, config)
    if awake:
        wake(module)
    return module, inputs


def output(module: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found = module(inputs)
    return getattr(found, "logits", found)


# Putting adapters in.


@every_build
def test_a_fresh_adapter_does_not_change_the_function(name: str) -> None:
    build, inputs, config = BUILDS[name]
    module = build().eval()
    before = output(module, inputs)
    inject_lora(module, config)
    assert torch.equal(output(module, inputs), before)
    assert not any(layer.lora_moved for layer in lora_layers(module).values())


@every_build
def test_the_base_is_the_same_objects_under_the_same_names(name: str) -> None:
    build, _, config = BUILDS[name]
    module = build()
    before = portrait(module)
    inject_lora(module, config)
    after = portrait(module)
    assert after["modules"] == before["modules"]
    assert {key: after["parameters"][key] for key in before["parameters"]} == before["parameters"]
    assert {key: after["state"][key] for key in before["state"]} == before["state"]
    assert [key for key in module.state_dict() if "lora_" not in key] == list(before["state"])
    assert {key.rpartition(".")[2] for key in after["state"].keys() - before["state"].keys()} == {"lora_A", "lora_B"}
    for child, kind in before["classes"].items():
        assert issubclass(after["classes"][child], kind)


def test_an_adapted_layer_is_still_what_it_was() -> None:
    module = Mixed()
    inject_lora(module, LoRAConfig(rank=2, adapt_embeddings=True))
    assert isinstance(module.plain, nn.Linear)
    assert type(module.plain) is LoRALinear
    assert isinstance(module.own, Doubled)
    assert isinstance(module.own, LoRALinear)
    assert isinstance(module.transposed, Conv1D)
    assert type(module.table) is LoRAEmbedding
    assert "rank=2, alpha=32" in repr(module.plain)
    assert "LoRADoubled" in repr(module)


def test_hooks_and_user_forwards_keep_firing() -> None:
    module, seen = Mixed(), []
    module.plain.register_forward_hook(lambda *_: seen.append("after"))
    module.own.register_forward_pre_hook(lambda *_: seen.append("before"))
    inject_lora(module, LoRAConfig(rank=2))
    module(ROWS)
    assert (sorted(seen), module.own.calls) == (["after", "before"], 1)
    merge_lora(module)
    unmerge_lora(module)
    remove_lora(module)
    module(ROWS)
    assert (len(seen), module.own.calls) == (4, 2)


def test_a_base_checkpoint_still_loads() -> None:
    module, base = mlp(), mlp(seed=1).state_dict()
    inject_lora(module, ALL)
    missing, unexpected = module.load_state_dict(base, strict=False)
    assert not unexpected
    assert all(name.rpartition(".")[2] in ("lora_A", "lora_B") for name in missing)
    assert torch.equal(module.first.weight, base["first.weight"])


def test_adapting_twice_is_refused() -> None:
    module = mlp()
    inject_lora(module, ALL)
    before = portrait(module)
    with pytest.raises(ConfigError, match=r"adapted already; call remove_lora"):
        inject_lora(module, LoRAConfig(rank=2, targets=["first"]))
    assert portrait(module) == before
    outer = nn.ModuleDict({"inner": module, "more": nn.Linear(4, 4)})
    with pytest.raises(ConfigError, match="adapted already"):
        inject_lora(outer, ALL)


def test_every_operation_needs_an_adapter() -> None:
    module = mlp()
    for operation in (merge_lora, unmerge_lora, remove_lora, lora_state_dict, lambda m: load_lora_state_dict(m, {})):
        with pytest.raises(ConfigError, match=r"Net has no adapters: call inject_lora"):
            operation(module)
    with pytest.raises(ConfigError, match="no adapters"), disable_lora(module):
        pass
    assert lora_layers(module) == {}
    assert count_parameters(module).adapter == 0


def test_factors_start_as_documented() -> None:
    torch.manual_seed(0)
    module = nn.ModuleDict({"wide": nn.Linear(400, 64), "table": nn.Embedding(50, 40)})
    inject_lora(module, LoRAConfig(rank=16, adapt_embeddings=True))
    wide, table = lora_layers(module).values()
    bound = 1 / 400**0.5
    assert wide.lora_A.abs().max() <= bound
    assert wide.lora_A.var().item() == pytest.approx(1 / (3 * 400), rel=0.1)
    assert not wide.lora_B.any()
    assert not table.lora_A.any()
    assert table.lora_B.var().item() == pytest.approx(1, rel=0.2)
    other = nn.Linear(400, 64)
    inject_lora(other, LoRAConfig(rank=64))
    assert lora_layers(other)[""].lora_A.var().item() == pytest.approx(1 / (3 * 400), rel=0.05)
    gaussian = nn.Linear(400, 64)
    inject_lora(gaussian, LoRAConfig(rank=16, init="gaussian"))
    assert lora_layers(gaussian)[""].lora_A.std().item() == pytest.approx(1 / 16, rel=0.05)


def test_counts_are_those_of_the_shapes() -> None:
    module = mlp()
    report = inject_lora(module, ALL)
    count = count_parameters(module)
    base = 16 * 32 + 32 + 2 * 32 + 32 * 8
    assert count.adapter == count.trainable == 4 * (16 + 32) + 4 * (32 + 8)
    assert count.total == base + count.adapter
    assert count.by_role == {"other": count.adapter}
    assert report.parameters == count
    assert report.adapter_bytes == 4 * count.adapter
    assert count.share == count.adapter / count.total


@every_build
def test_only_the_factors_learn(name: str) -> None:
    module, inputs = adapted(name)
    found = module(inputs)
    getattr(found, "logits", found).float().square().mean().backward()
    for key, parameter in module.named_parameters():
        is_factor = key.rpartition(".")[2] in ("lora_A", "lora_B")
        assert parameter.requires_grad is is_factor
        assert (parameter.grad is not None and bool(parameter.grad.any())) is is_factor, key


def test_training_leaves_the_base_bit_identical() -> None:
    model = llama().train()
    before = state_bytes(model)
    inject_lora(model, WITH_TABLES)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]
    after = state_bytes(model)
    assert {key: after[key] for key in before} == before
    remove_lora(model)
    assert state_bytes(model) == before


# Types.


@pytest.mark.parametrize(
    ("base", "asked", "expected"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, "bfloat16", torch.bfloat16),
        (torch.float32, "float64", torch.float64),
    ],
)
def test_factors_are_at_least_float32_unless_asked(base: torch.dtype, asked: str | None, expected: torch.dtype) -> None:
    module = mlp(base)
    inject_lora(module, LoRAConfig(rank=4, adapter_dtype=asked))
    wake(module)
    assert {tensor.dtype for tensor in lora_state_dict(module).values()} == {expected}
    y = module(torch.randn(3, 16, dtype=base))
    assert y.dtype == base
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == expected for p in module.parameters() if p.requires_grad)


def test_a_default_dtype_set_by_others_does_not_reach_the_factors() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = mlp(torch.bfloat16)
        inject_lora(module, ALL)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {tensor.dtype for tensor in lora_state_dict(module).values()} == {torch.float32}


def test_autocast_gives_the_low_type_and_gradients_in_the_wide_one() -> None:
    module = mlp()
    inject_lora(module, ALL)
    wake(module)
    x = torch.randn(3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), module(x), rtol=5e-2, atol=5e-2)
    y.float().sum().backward()
    assert {p.grad.dtype for p in module.parameters() if p.grad is not None} == {torch.float32}


def test_float64_is_exact_to_float64() -> None:
    module = mlp(torch.float64)
    inject_lora(module, ALL)
    wake(module)
    x = torch.randn(3, 16, dtype=torch.float64)
    layer = lora_layers(module)["first"]
    expected = x @ (module.first.weight + 32 / 4 * layer.lora_B @ layer.lora_A).T + module.first.bias
    torch.testing.assert_close(module.first(x), expected, rtol=1e-13, atol=1e-13)


def test_dropout_acts_in_training_only() -> None:
    module = nn.Linear(64, 8)
    inject_lora(module, LoRAConfig(rank=4, dropout=0.5))
    wake(module, size=1.0)
    plain = nn.Linear(64, 8)
    plain.load_state_dict(module.state_dict(), strict=False)
    inject_lora(plain, ALL)
    load_lora_state_dict(plain, lora_state_dict(module))
    x = torch.randn(5, 64)
    module.eval()
    assert torch.equal(module(x), plain(x))
    module.train()
    first, second = module(x), module(x)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    with torch.no_grad():
        mean = torch.stack([module(x) for _ in range(4000)]).mean(0)
        spread = torch.stack([module(x) for _ in range(400)]).std(0)
    assert ((mean - plain(x)).abs() < 5 * spread / 4000**0.5).all()


# Merging.


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


# Taking off and switching off.


@every_build
def test_removing_restores_classes_names_and_function(name: str) -> None:
    build, inputs, config = BUILDS[name]
    module = build().eval()
    before, function = portrait(module), output(module, inputs)
    inject_lora(module, config)
    wake(module)
    remove_lora(module)
    after = portrait(module)
    assert {key: after[key] for key in after if key != "trains"} == {
        key: before[key] for key in after if key != "trains"
    }
    assert not any(after["trains"].values())
    assert torch.equal(output(module, inputs), function)


def test_removing_a_merged_adapter_keeps_the_merged_function() -> None:
    module, inputs = adapted("mixed")
    merge_lora(module)
    merged = output(module, inputs)
    remove_lora(module)
    assert torch.equal(output(module, inputs), merged)
    assert not any("lora" in name for name in module.state_dict())
    inject_lora(module, LoRAConfig(rank=2))
    assert torch.equal(output(module, inputs), merged)


def test_disabling_nests_and_survives_exceptions() -> None:
    module, inputs = adapted("mixed")
    awake = output(module, inputs)
    asleep = output(adapted("mixed", awake=False)[0], inputs)
    with disable_lora(module):
        assert torch.equal(output(module, inputs), asleep)
        with disable_lora(module):
            assert torch.equal(output(module, inputs), asleep)
        assert torch.equal(output(module, inputs), asleep)
        with pytest.raises(KeyError), disable_lora(module.get_submodule("plain")):
            raise KeyError("inside")
        assert torch.equal(output(module, inputs), asleep)
    assert torch.equal(output(module, inputs), awake)
    with pytest.raises(KeyError), disable_lora(module):
        raise KeyError("inside")
    assert torch.equal(output(module, inputs), awake)
    with disable_lora(module.get_submodule("plain")):
        partly = output(module, inputs)
    assert not torch.equal(partly, awake)
    assert not torch.equal(partly, asleep)


# State dicts.


@every_build
def test_adapter_state_carries_the_function_to_another_module(name: str) -> None:
    module, inputs = adapted(name)
    state = lora_state_dict(module)
    assert list(state) == [f"{layer}.lora_{side}" for layer in lora_layers(module) for side in "AB"]
    assert not any(tensor.requires_grad for tensor in state.values())
    other, _ = adapted(name, awake=False)
    load_lora_state_dict(other, state)
    assert torch.equal(output(other, inputs), output(module, inputs))


def test_a_single_adapted_layer_has_plain_names() -> None:
    layer = nn.Linear(4, 4)
    inject_lora(layer, LoRAConfig(rank=2))
    assert list(lora_state_dict(layer)) == ["lora_A", "lora_B"]
    assert list(lora_layers(layer)) == [""]


CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], tuple[str, ...]]] = {
    "missing": (lambda s: s.pop("first.lora_B"), ("1 of 4", "missing first.lora_B")),
    "extra": (lambda s: s.update({"third.lora_A": torch.zeros(1)}), ("1 of 4", "unknown third.lora_A")),
    "shape": (
        lambda s: s.update({"second.lora_A": torch.zeros(3, 32)}),
        ("second.lora_A has shape (3, 32), expected (4, 32)",),
    ),
    "transposed": (lambda s: s.update({"second.lora_A": s["second.lora_A"].T}), ("(32, 4), expected (4, 32)",)),
    "renamed prefix": (
        lambda s: [s.update({f"model.{name}": s.pop(name)}) for name in list(s)],
        ("8 of 4", "missing first.lora_A", "and 3 more"),
    ),
    "empty": (lambda s: s.clear(), ("4 of 4 expected", "missing first.lora_A")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_loading_is_strict_and_never_partial(change: str) -> None:
    module, source = mlp(), mlp()
    for each in (module, source):
        inject_lora(each, ALL)
    wake(source)
    state = lora_state_dict(source)
    damage, words = CHANGES[change]
    damage(state)
    before = portrait(module)
    with pytest.raises(AdapterFileError) as error:
        load_lora_state_dict(module, state)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert isinstance(error.value, LoRAError)
    assert portrait(module) == before


# Copies.


@every_build
@pytest.mark.parametrize("merged", [False, True])
def test_copies_compute_the_same_and_share_nothing(name: str, merged: bool) -> None:
    module, inputs = adapted(name)
    if merged:
        merge_lora(module)
    function = output(module, inputs)
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    for twin in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(stream, weights_only=False),
    ):
        assert torch.equal(output(twin, inputs), function)
        assert portrait(twin)["classes"] == portrait(module)["classes"]
        assert portrait(twin)["state"] == portrait(module)["state"]
        wake(twin, seed=9)
        if merged:
            unmerge_lora(twin)
        remove_lora(twin)
        assert torch.equal(output(module, inputs), function)
    build, _, _ = BUILDS[name]
    assert {type(child) for child in twin.modules()} == {type(child) for child in build().modules()}


def test_an_adapted_subclass_unpickles_in_another_process(tmp_path: Path) -> None:
    module, inputs = adapted("mixed")
    torch.save((module, inputs, output(module, inputs)), tmp_path / "module.pt")
    code = (
        "import torch; module, inputs, expected = torch.load('module.pt', weights_only=False);"
        "assert torch.equal(module(inputs), expected); print(type(module.own).__name__)"
    )
    root = str(toys.ROOT)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r}); {code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "LoRADoubled"), done.stderr


# Extending.


def test_a_registered_layer_is_adapted(registries: None) -> None:
    class Ratio(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    class LoRARatio(LoRALayer):
        @staticmethod
        def dimensions(module: Any) -> tuple[int, int]:
            return 4, 6

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y + self.lora_spec.scale * x @ self.lora_A.T @ self.lora_B.T if self.lora_active else y

    register_layer(Ratio, LoRARatio)
    module = nn.Sequential(Ratio(), nn.ReLU())
    assert list(inject_lora(module, LoRAConfig(rank=2)).layers) == ["0"]
    wake(module)
    x = torch.randn(3, 4)
    before = output(module, x)
    merge_lora(module)
    torch.testing.assert_close(output(module, x), before)
    remove_lora(module)
    assert type(module[0]) is Ratio


@pytest.mark.parametrize(
    ("kind", "adapter"), [(nn.Linear(2, 2), LoRALinear), (int, LoRALinear), (nn.Linear, nn.Linear)]
)
def test_a_bad_registration_is_refused(kind: Any, adapter: Any, registries: None) -> None:
    with pytest.raises(ConfigError, match="register_layer needs"):
        register_layer(kind, adapter)


# Compilation.


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_module_equals_the_eager_one_in_one_graph() -> None:
    torch.compiler.reset()
    module, eager = mlp(), mlp()
    for each in (module, eager):
        inject_lora(each, ALL)
        wake(each)
    x = torch.randn(3, 16)
    y, expected = torch.compile(module, fullgraph=True)(x), eager(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in eager.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(module.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-6)


def test_a_compiled_module_sees_adapters_switched_off_merged_and_loaded() -> None:
    torch.compiler.reset()
    module = mlp()
    inject_lora(module, ALL)
    wake(module)
    compiled, x = torch.compile(module, fullgraph=True, backend="eager"), torch.randn(3, 16)
    awake = module(x)
    torch.testing.assert_close(compiled(x), awake, rtol=1e-5, atol=1e-6)
    with disable_lora(module):
        asleep = module(x)
        torch.testing.assert_close(compiled(x), asleep, rtol=1e-5, atol=1e-6)
    merge_lora(module)
    torch.testing.assert_close(compiled(x), awake, rtol=1e-5, atol=1e-5)
    unmerge_lora(module)
    wake(module, seed=5)
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(awake, asleep)
    assert not torch.allclose(awake, module(x))


def test_a_compiled_module_has_the_names_of_the_eager_one() -> None:
    module = mlp()
    inject_lora(module, ALL)
    wake(module)
    compiled = torch.compile(module, backend="eager")
    assert isinstance(compiled, nn.Module)
    assert list(lora_state_dict(compiled)) == list(lora_state_dict(module))
    load_lora_state_dict(compiled, lora_state_dict(module))
    inner = mlp()
    inject_lora(inner, ALL)
    inner.first = torch.compile(inner.first, backend="eager")  # pyright: ignore
    assert list(lora_state_dict(inner)) == list(lora_state_dict(module))


# Size.


def test_a_70b_model_is_adapted_without_memory_and_at_once() -> None:
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    start = time.perf_counter()
    report = inject_lora(model, LoRAConfig(rank=16))
    seconds = time.perf_counter() - start
    print(f"560 layers adapted in {seconds:.2f} s")
    assert len(report.layers) == len(lora_layers(model)) == 560
    assert all(tensor.is_meta for tensor in (*model.parameters(), *lora_state_dict(model).values()))
    # Per layer and unit of rank: q and o 2 x 16384, k and v 2 x 9216, gate, up and down 3 x 36864.
    assert report.parameters.adapter == 80 * 16 * (2 * 16_384 + 2 * 9_216 + 3 * 36_864)
    assert seconds < 10
    remove_lora(model)
    assert not lora_layers(model)


def test_embeddings_and_transposed_layers_are_adapted_on_meta() -> None:
    with torch.device("meta"):
        model = Mixed()
    report = inject_lora(model, LoRAConfig(rank=2, adapt_embeddings=True))
    assert {name: spec.role for name, spec in report.layers.items()} == {
        "table": "embedding",
        "own": "other",
        "transposed": "other",
        "plain": "other",
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in lora_state_dict(model).items()}
    assert shapes["table.lora_A"] == (2, 11)
    assert shapes["table.lora_B"] == (8, 2)
    assert shapes["transposed.lora_A"] == (2, 6)
    assert shapes["transposed.lora_B"] == (5, 2)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    for layer in lora_layers(model).values():
        layer.reset_parameters()
        assert not layer.lora_moved


def test_nets_are_independent() -> None:
    first, second = Net(), Net()
    inject_lora(first, ALL)
    assert type(second.first) is nn.Linear
    assert not logits(llama()).isnan().any()
