"""On every architecture of the table: all is adapted, all learns, and saving and merging change nothing."""

from __future__ import annotations

from contextlib import nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from docs.architectures import PAGE, columns, line
from lightning_lora import disable_lora, load_adapter, lora_layers, merge_lora, save_adapter, unmerge_lora
from tests.architectures import ARCHITECTURES, Architecture
from tests.architectures.entry import PEFT_LOADS
from tests.architectures.laws import adapted, base_weights, changed_by_merging, difference, output, reason_to_leave_out
from tests.support.toys import same, snapshot

pytestmark = [
    # PEFT asks transformers for a name of the past.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning"),
    # PEFT looks for fused experts among modules only and says so; it finds their ranks all the same.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match any targeted:RuntimeWarning"),
    # PEFT sets this itself for GPT-2, layer by layer, and says so each time.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

every_architecture = pytest.mark.parametrize("entry", ARCHITECTURES, ids=lambda entry: entry.name)
with_peft = [entry for entry in ARCHITECTURES if entry.peft == PEFT_LOADS]
without_peft = [entry for entry in ARCHITECTURES if entry.peft != PEFT_LOADS]


def test_the_table_is_as_large_as_promised() -> None:
    plain = [entry for entry in ARCHITECTURES if entry.family == "plain torch"]
    assert len(ARCHITECTURES) - len(plain) >= 22
    assert len(plain) >= 8
    assert len({entry.name for entry in ARCHITECTURES}) == len(ARCHITECTURES)


@every_architecture
def test_no_weight_matrix_is_left_out_without_a_reason(entry: Architecture) -> None:
    module, _ = adapted(entry)
    reached = changed_by_merging(module)
    without_reason = {name for name in base_weights(module) if reason_to_leave_out(entry, name) is None}
    assert reached == without_reason


@every_architecture
def test_the_report_tells_roles_reasons_share_and_size_in_at_most_eight_lines(entry: Architecture) -> None:
    module, report = adapted(entry)
    text = str(report)
    assert len(text.splitlines()) <= 8
    roles = [spec.role for spec in report.layers.values()]
    assert all(f"{roles.count(role)} {role}" in text for role in roles)
    assert all(reason in text for reason in report.skipped.values())
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    assert f"{trained:,} of" in text
    assert f"adapter {report.adapter_bytes / 1e6:.2f} MB" in text


@every_architecture
def test_every_reason_of_the_table_is_of_use(entry: Architecture) -> None:
    names = base_weights(entry.build())
    idle = [pattern for pattern in entry.left_out if not any(fnmatchcase(name, pattern) for name in names)]
    assert not idle


@every_architecture
def test_one_step_gives_every_factor_a_gradient_and_leaves_the_base(entry: Architecture) -> None:
    module, _ = adapted(entry)
    before = snapshot(module)
    factors = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    result = entry.output(module, **entry.inputs())
    # A random mixture of all outputs: no symmetry of a loss hides a layer.
    (result * torch.randn(result.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    # The leading axis of three is the expert: each must have had a token.
    silent = [name for name, factor in factors.items() if not _all_nonzero(factor)]
    assert not silent
    torch.optim.AdamW(factors.values(), lr=1e-2).step()
    changed = {name for name, tensor in snapshot(module).items() if not torch.equal(tensor, before[name])}
    assert changed == factors.keys()


def _all_nonzero(factor: Any) -> bool:
    if factor.grad is None:
        return False
    parts = factor.grad if factor.ndim == 3 else factor.grad[None]
    return bool(parts.flatten(1).any(1).all())


def saved(entry: Architecture, module: nn.Module, folder: Path) -> None:
    with pytest.warns(UserWarning, match=entry.save_warns) if entry.save_warns else nullcontext():
        save_adapter(module, folder)


@every_architecture
def test_a_saved_adapter_gives_a_fresh_model_the_same_function(entry: Architecture, tmp_path: Path) -> None:
    module, _ = adapted(entry)
    fresh = entry.build()
    saved(entry, module, tmp_path / "adapter")
    load_adapter(fresh, tmp_path / "adapter")
    assert lora_layers(fresh).keys() == lora_layers(module).keys()
    assert torch.equal(output(entry, fresh), output(entry, module))


@every_architecture
def test_merging_keeps_the_function_and_unmerging_the_bits(entry: Architecture) -> None:
    module, _ = adapted(entry)
    before, expected = snapshot(module), output(entry, module)
    with disable_lora(module):
        base = output(entry, module)
    # torch's own fast path for decoders rounds otherwise, and adapted layers do not take it.
    assert difference(base, output(entry, entry.build())) <= 1e-6
    assert difference(base, expected) > 1e-3
    merge_lora(module)
    assert difference(expected, output(entry, module)) <= 1e-5
    unmerge_lora(module)
    assert same(before, snapshot(module))


def outputs_here_and_in_peft(entry: Architecture, folder: Path) -> tuple[Tensor, Tensor]:
    module, _ = adapted(entry)
    saved(entry, module, folder)
    theirs: Any = peft.PeftModel.from_pretrained(entry.build(), folder)  # pyright: ignore[reportArgumentType]
    return output(entry, module), output(entry, theirs.eval().base_model.model)


@pytest.mark.parametrize("entry", with_peft, ids=lambda entry: entry.name)
def test_peft_loads_the_folder_with_equal_outputs(entry: Architecture, tmp_path: Path) -> None:
    assert difference(*outputs_here_and_in_peft(entry, tmp_path / "adapter")) <= 1e-5


@pytest.mark.parametrize("entry", without_peft, ids=lambda entry: entry.name)
def test_where_the_table_says_so_peft_still_cannot(entry: Architecture, tmp_path: Path) -> None:
    try:
        apart = difference(*outputs_here_and_in_peft(entry, tmp_path / "adapter"))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        return
    assert apart > 1e-3, "PEFT has learnt it: say yes in the table"


@every_architecture
def test_the_page_in_docs_says_what_the_script_finds(entry: Architecture) -> None:
    # All but the last column, a number that depends on the machine.
    assert line(columns(entry)) in PAGE.read_text()
