"""Which implementation of attention a task uses, and that packed rows train alike under all that run here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex
from transformers import masking_utils
from transformers.integrations import flex_attention as flex

from lightning_lora.memory.step_trace import trace_step
from lightning_lora.tasks.attention import implementation as attention
from lightning_lora.tasks.attention.packing_check import check_packing
from tests.support import packed, tiny_models, toys
from tests.tasks.conftest import fit, make, token_loader

pytestmark = toys.expected_warnings


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_setting_reaches_the_model(name: str, llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder, attn_implementation=name)
    fit(module, tmp_path)
    assert module.model is not None
    assert module.model.config._attn_implementation == name


def test_without_the_setting_the_config_of_the_model_decides(tmp_path: Path) -> None:
    folder = packed.save(tiny_models.llama(), tmp_path / "model", "eager")
    module = make(folder)
    module.configure_model()
    assert module.model is not None
    assert module.model.config._attn_implementation == "eager"


def test_an_implementation_that_is_not_installed_is_one_clear_error(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder, attn_implementation="flash_attention_3")
    said = r"attn_implementation='flash_attention_3' cannot be used with this model on this machine: .* eager, sdpa, "
    with pytest.raises(ValueError, match=said):
        fit(module, tmp_path)


def test_a_registered_implementation_is_accepted(llama_folder: Path) -> None:
    from transformers import AttentionInterface

    AttentionInterface.register("mine", AttentionInterface()["sdpa"])
    assert make(llama_folder, attn_implementation="mine").attn_implementation == "mine"


def test_a_step_is_traced_whatever_the_implementation(llama_folder: Path) -> None:
    batch = next(iter(token_loader()))
    traced = [trace_step(make(llama_folder, attn_implementation=name), batch) for name in ("sdpa", "flex_attention")]
    assert traced[0].memory == traced[1].memory


_REFUSE = torch_flex._validate_device


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flex attention computed by its formula, with the block mask that transformers makes of packed rows.

    torch refuses its backward pass on a CPU, where there is no kernel for it; the formula has one.
    """

    def formula(query: Any, key: Any, value: Any, training: bool = False, **options: Any) -> Any:
        return torch_flex.flex_attention(query, key, value, **options)

    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "compile_friendly_flex_attention", formula)
    made: Any = torch_flex.create_block_mask
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda **options: made(**options | {"_compile": False}))


@pytest.mark.parametrize(
    ("name", "other"), [("Llama", "sdpa"), ("Mistral", "sdpa"), ("Gemma 2", "eager"), ("mixtral", "sdpa")]
)
def test_packed_rows_train_alike_under_flex_attention(name: str, other: str, tmp_path: Path, flex_on_cpu: None) -> None:
    build = packed.KEEPS_APART[name]
    rows = packed.examples()
    found = []
    for implementation in (other, "flex_attention"):
        folder = packed.save(build(), tmp_path / implementation, implementation)
        found.append(packed.trained(folder, tmp_path, packed.LAYOUTS["packs"](rows)))
    assert found[1].model.config._attn_implementation == "flex_attention"
    packed.assert_same_training(found[1], found[0])


def chosen(model: Any, device: str, shape: tuple[int, int] = (2, 16), *, is_given: bool = False) -> tuple[str, bool]:
    def logits(ids: Any, **options: Any) -> Any:
        return model(input_ids=ids, use_cache=False, **options).logits

    check = partial(check_packing, model, logits, tiny_models.VOCAB)
    separates = attention.choose_for_packing(model, shape, check, is_given=is_given, device=device)
    return model.config._attn_implementation, separates


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_triton", lambda: True)
    trial = attention._train_flex
    monkeypatch.setattr(attention, "_train_flex", lambda config, dtype, device: trial(config, dtype, "cpu"))


def test_a_cpu_keeps_what_it_has_and_says_what_the_mask_takes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert chosen(tiny_models.llama(), "cpu", (2, 1024)) == ("sdpa", True)
    assert "packed rows: sdpa with a mask of 2 x 1,024 x 1,024 (2.1 MB)" in caplog.text


def test_eager_attention_adds_numbers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert chosen(tiny_models.llama(attn_implementation="eager"), "cpu", (2, 1024))[0] == "eager"
    assert "packed rows: eager with a mask of 2 x 1,024 x 1,024 (8.39 MB)" in caplog.text


def test_a_gpu_takes_flex_attention_where_it_works(
    caplog: pytest.LogCaptureFixture, flex_on_cpu: None, with_triton: None
) -> None:
    with caplog.at_level("INFO"):
        assert chosen(tiny_models.llama(), "cuda") == ("flex_attention", True)
    assert "packed rows: flex_attention (attn_implementation: sdpa keeps sdpa)" in caplog.text


WHY: dict[str, tuple[Callable[[], Any], str]] = {
    "dropout": (
        lambda: tiny_models.llama(attention_dropout=0.1),
        "flex_attention: it has no dropout, and the config of the model sets one",
    ),
    "no support": (packed.KEEPS_APART["olmoe"], "flex_attention: OlmoeForCausalLM does not support it"),
    "a kernel that fails": (
        tiny_models.llama,
        "flex_attention: NotImplementedError: FlexAttention does not support backward on CPU",
    ),
}


@pytest.mark.parametrize("case", WHY)
def test_a_gpu_keeps_sdpa_with_a_warning_that_says_why(
    case: str, monkeypatch: pytest.MonkeyPatch, flex_on_cpu: None, with_triton: None
) -> None:
    build, reason = WHY[case]
    monkeypatch.setattr(torch_flex, "_validate_device", _REFUSE)
    with pytest.warns(UserWarning, match="packed rows") as told:
        assert chosen(build(), "cuda", (4, 2048)) == ("sdpa", True)
    (text,) = [str(each.message) for each in told if "packed rows" in str(each.message)]
    assert text.startswith("packed rows: sdpa with a mask of 4 x 2,048 x 2,048 (16.8 MB), and attention is computed")
    assert "flash_attention_2: flash-attn is not installed" in text
    assert reason in text


def test_a_model_that_flex_attention_would_mix_up_keeps_sdpa(
    monkeypatch: pytest.MonkeyPatch, flex_on_cpu: None, with_triton: None
) -> None:
    # A mask without the bounds of examples, as a model makes it that does not read them off the positions.
    whole = masking_utils.find_packed_sequence_indices
    model = tiny_models.llama()
    leaks = lambda ids: whole(ids) if model.config._attn_implementation == "sdpa" else None  # noqa: E731
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", leaks)
    with pytest.warns(UserWarning, match="LlamaForCausalLM does not keep packed examples apart"):
        assert chosen(model, "cuda") == ("sdpa", True)


def test_what_the_user_has_chosen_stays(flex_on_cpu: None, with_triton: None) -> None:
    with pytest.warns(UserWarning, match="packed rows: sdpa with a mask of 2 x 16 x 16"):
        assert chosen(tiny_models.llama(), "cuda", is_given=True)[0] == "sdpa"


def test_products_in_the_type_of_autocast_allow_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    model = tiny_models.llama()
    assert attention._obstacle(model, "flash_attention_2", "cpu") == "it does not compute in torch.float32"
    with torch.autocast("cpu", torch.bfloat16):
        assert attention._obstacle(model, "flash_attention_2", "cpu") == ""
