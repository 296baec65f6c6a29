"""Which architectures keep packed examples apart, as their logits say; `docs/use/packing.md` lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora.errors import ConfigError
from lightning_lora.tasks.attention.packing_check import _rounding_unit, check_packing
from tests.support import tiny_models
from tests.support.packed import KEEPS_APART, MIXES


def probe(model: Any) -> bool:
    def logits(ids: Tensor, **given: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False, **given).logits

    return check_packing(model, logits, 64)


@pytest.mark.parametrize("model", KEEPS_APART.values(), ids=KEEPS_APART)
def test_these_keep_examples_apart(model: Callable[[], Any]) -> None:
    assert probe(model())


@pytest.mark.parametrize("model", MIXES.values(), ids=MIXES)
def test_these_mix_examples_and_are_refused(model: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match=r"in one row, the logits of two examples change by .* of their size"):
        probe(model())


def test_a_model_without_positions_is_refused_with_the_reason() -> None:
    model = tiny_models.llama()

    def logits(ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return model(input_ids=ids, attention_mask=attention_mask).logits

    with pytest.raises(ConfigError, match=r"it does not take position_ids \(.*unexpected keyword argument"):
        check_packing(model, logits, 64)


def test_positions_counted_from_elsewhere_are_refused_though_no_example_sees_another() -> None:
    model = tiny_models.gpt2()
    model.transformer.wpe.weight.data.mul_(0.03)

    def logits(ids: Tensor, position_ids: Tensor | None = None, **given: Tensor) -> Tensor:
        return model(input_ids=ids, position_ids=None if position_ids is None else position_ids + 1, **given).logits

    with pytest.raises(ConfigError, match=r"change by \d\.\de-02 and "):
        check_packing(model, logits, 64)


def test_logits_that_are_no_numbers_do_not_pass() -> None:
    model = tiny_models.llama()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ConfigError, match="change by nan and nan"):
        probe(model)


@pytest.fixture
def default_precision() -> Iterator[None]:
    """The precision of float32 products is a global setting; it is restored."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.usefixtures("default_precision")
@pytest.mark.parametrize("newer", [True, False])
def test_tf32_is_seen_whichever_api_has_set_it(newer: bool) -> None:
    """Once the newer API was used, `torch.get_float32_matmul_precision` raises RuntimeError."""
    model = tiny_models.llama()
    on_cuda: Any = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))
    assert _rounding_unit(model, on_cuda) == torch.finfo(torch.float32).eps
    if newer:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    else:
        torch.set_float32_matmul_precision("high")
    assert _rounding_unit(model, on_cuda) == 2.0**-10
