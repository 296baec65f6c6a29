"""The laws that LoRA keeps on every architecture of the table.

Each architecture is one test, since building and adapting it is most of the work; each law is a subtest of it.
"""

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
from lightning_lora import disable_lora, inject_lora, load_adapter, lora_layers, merge_lora, save_adapter, unmerge_lora
from tests.architectures import ARCHITECTURES, Architecture
from tests.architectures.adapted_model import AdaptedModel, difference
from tests.architectures.entry import PEFT_LOADS
from tests.support.toys import same, snapshot

pytestmark = [
    # PEFT asks transformers for a deprecated name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning"),
    # PEFT looks for fused experts among modules only and says so; it finds their ranks all the same.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match any targeted:RuntimeWarning"),
    # PEFT sets this itself for GPT-2, layer by layer, and says so each time.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]


def test_the_table_is_as_large_as_promised() -> None:
    plain = [entry for entry in ARCHITECTURES if entry.family == "plain torch"]
    assert len(ARCHITECTURES) - len(plain) >= 22
    assert len(plain) >= 8
    assert len({entry.name for entry in ARCHITECTURES}) == len(ARCHITECTURES)


def no_weight_matrix_is_left_out_without_a_reason(model: AdaptedModel, folder: Path) -> None:
    # Told by the values that merging changes, not by what any report says.
    module = model.copy()
    before = matrices(module)
    merge_lora(module)
    reached = {name for name, tensor in matrices(module).items() if not torch.equal(tensor, before[name])}
    assert reached == {name for name in before if model.reason_to_leave_out(name) is None}


def the_report_tells_roles_reasons_share_and_size_in_at_most_eight_lines(model: AdaptedModel, folder: Path) -> None:
    text, report = str(model.report), model.report
    assert len(text.splitlines()) <= 8
    roles = [spec.role for spec in report.layers.values()]
    assert all(f"{roles.count(role)} {role}" in text for role in roles)
    assert all(reason in text for reason in report.skipped.values())
    trained = sum(parameter.numel() for parameter in model.module.parameters() if parameter.requires_grad)
    assert f"{trained:,} of" in text
    assert f"adapter {report.adapter_bytes / 1e6:.2f} MB" in text


def every_reason_of_the_table_is_needed(model: AdaptedModel, folder: Path) -> None:
    names = matrices(model.base())
    idle = [pattern for pattern in model.entry.left_out if not any(fnmatchcase(name, pattern) for name in names)]
    assert not idle


def a_fresh_adapter_changes_no_bit_in_any_type(model: AdaptedModel, folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, "autocast"):
        base = model.base() if dtype == "autocast" else model.base().to(dtype)
        try:
            expected = model.output_in(base, dtype)
        except RuntimeError:
            # A model that does not compute in this type; in its own type every model does.
            assert dtype != torch.float32
            continue
        # Attention of torch reads weights itself, and on some processors multiplies by frozen ones in another order.
        frozen = model.output_in(base.requires_grad_(False), dtype)
        inject_lora(base, model.config)
        for context in (nullcontext(), disable_lora(base)):
            with context:
                found = model.output_in(base, dtype)
            assert torch.equal(found, expected) or torch.equal(found, frozen)


def one_step_gives_every_factor_a_gradient_and_leaves_the_base(model: AdaptedModel, folder: Path) -> None:
    module = model.copy()
    before = snapshot(module)
    factors = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    result = model.entry.output(module, **model.entry.inputs())
    # A random mixture of all outputs: no symmetry of a loss hides a layer.
    (result * torch.randn(result.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    silent = [name for name, factor in factors.items() if not every_expert_has_gradient(factor)]
    assert not silent
    torch.optim.AdamW(factors.values(), lr=1e-2).step()
    changed = {name for name, tensor in snapshot(module).items() if not torch.equal(tensor, before[name])}
    assert changed == factors.keys()


def a_saved_adapter_gives_a_fresh_model_the_same_function(model: AdaptedModel, folder: Path) -> None:
    fresh = model.base()
    load_adapter(fresh, saved(model, folder))
    assert lora_layers(fresh).keys() == lora_layers(model.module).keys()
    assert torch.equal(model.output(fresh), model.expected)


def merging_keeps_the_function_and_unmerging_the_bits(model: AdaptedModel, folder: Path) -> None:
    module = model.copy()
    before = snapshot(module)
    assert torch.equal(model.output(module), model.expected)
    with disable_lora(module):
        base = model.output(module)
    # torch's own fast path for decoders rounds otherwise, and adapted layers do not take it.
    assert difference(base, model.output(model.base())) <= 1e-6
    assert difference(base, model.expected) > 1e-3
    merge_lora(module)
    assert difference(model.expected, model.output(module)) <= 1e-5
    unmerge_lora(module)
    assert same(before, snapshot(module))


def peft_loads_the_folder_with_equal_outputs_where_the_table_says_so(model: AdaptedModel, folder: Path) -> None:
    folder = saved(model, folder)
    if model.entry.peft == PEFT_LOADS:
        assert difference(model.expected, output_in_peft(model, folder)) <= 1e-5
        return
    try:
        apart = difference(model.expected, output_in_peft(model, folder))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        return
    assert apart > 1e-3, "PEFT has learnt it: say yes in the table"


def the_page_in_docs_says_what_the_script_finds(model: AdaptedModel, folder: Path) -> None:
    # All but the last column, a number that depends on the machine.
    assert line(columns(model)) in PAGE.read_text()


LAWS = (
    no_weight_matrix_is_left_out_without_a_reason,
    the_report_tells_roles_reasons_share_and_size_in_at_most_eight_lines,
    every_reason_of_the_table_is_needed,
    a_fresh_adapter_changes_no_bit_in_any_type,
    one_step_gives_every_factor_a_gradient_and_leaves_the_base,
    a_saved_adapter_gives_a_fresh_model_the_same_function,
    merging_keeps_the_function_and_unmerging_the_bits,
    peft_loads_the_folder_with_equal_outputs_where_the_table_says_so,
    the_page_in_docs_says_what_the_script_finds,
)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ARCHITECTURES, ids=lambda entry: entry.name)
def test_every_law_holds(entry: Architecture, tmp_path: Path, subtests: pytest.Subtests) -> None:
    model = AdaptedModel(entry)
    for law in LAWS:
        with subtests.test(law.__name__):
            law(model, tmp_path / "adapter")


def matrices(module: nn.Module) -> dict[str, Tensor]:
    """Copies of every parameter that has two axes or more and is not a factor."""
    return {
        name: parameter.detach().clone()
        for name, parameter in module.named_parameters()
        if parameter.ndim >= 2 and "lora_" not in name.rpartition(".")[2]
    }


def every_expert_has_gradient(factor: Any) -> bool:
    if factor.grad is None:
        return False
    # The leading axis of three is the expert: each must have had a token.
    parts = factor.grad if factor.ndim == 3 else factor.grad[None]
    return bool(parts.flatten(1).any(1).all())


def saved(model: AdaptedModel, folder: Path) -> Path:
    """The folder of the adapter, written by the first law that needs it."""
    if not folder.exists():
        warns = model.entry.save_warns
        with pytest.warns(UserWarning, match=warns) if warns else nullcontext():
            save_adapter(model.module, folder)
    return folder


def output_in_peft(model: AdaptedModel, folder: Path) -> Tensor:
    theirs: Any = peft.PeftModel.from_pretrained(model.base(), folder)  # pyright: ignore[reportArgumentType]
    return model.output(theirs.eval().base_model.model)
