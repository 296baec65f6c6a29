"""PEFT's own LoRA test tables, read by `load_adapter` and compared with PEFT's live models.

    python -m tests.harness.peft_cases CHECKOUT

``CHECKOUT`` is a work tree of https://github.com/huggingface/peft. For every row PEFT's model is built and its factors
are filled with random values, the adapter is saved and loaded here into a fresh base, and outputs, gradients and merged
outputs are compared, merged in memory and, for a model of transformers, on disk. The exit code is 0 if no row differs
or is refused wrongly, 1 otherwise, and 2 without a checkout.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_lora import AdapterFileError, load_adapter, lora_state_dict, merge_lora
from lightning_lora.files.adapter.peft_format import TENSOR_FILE
from lightning_lora.files.merge.merge_files import merge_files
from tests.harness.peft_tables import Absent, Row, rows

# Words that a refusal must hold for a setting that means another function than plain LoRA.
FEATURES = (
    "lora_bias",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "layer_replication",
)
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
PEFT_IS_WRONG = "PEFT is wrong"
OUTCOMES = (
    "equal",
    PEFT_IS_WRONG,
    "refused by name",
    "refused wrongly",
    "different",
    "not expressible in PEFT",
    "not in this PEFT",
)
TOLERANCE = 2e-5
SLOPE_TOLERANCE = 0.02


def main(given: list[str] | None = None) -> int:
    """Run every row and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("checkout", type=Path, nargs="?", help="work tree of the PEFT repository")
    parser.add_argument("--only", default="", help="run only rows whose name holds this text")
    parser.add_argument("--quiet", action="store_true", help="print the counts only")
    arguments = parser.parse_args(given)
    if arguments.checkout is None or not (arguments.checkout / "tests" / "test_custom_models.py").is_file():
        print(f"error: {arguments.checkout} is no checkout of PEFT: it has no tests/test_custom_models.py.")
        return 2
    counts: Counter[str] = Counter()
    lora: Counter[str] = Counter()
    for row in rows(arguments.checkout):
        if arguments.only not in row.name:
            continue
        outcome, detail = judged(row)
        counts[outcome] += 1
        if row.config is peft.LoraConfig:
            lora[outcome] += 1
        if not arguments.quiet and outcome not in ("equal", "not in this PEFT"):
            print(f"{outcome:24} {row.name}: {detail}", flush=True)
    for title, counter in (("every method", counts), ("LoRA", lora)):
        print(f"{title}: {sum(counter.values())} rows, " + ", ".join(f"{name} {counter[name]}" for name in OUTCOMES))
    return int(bool(counts["refused wrongly"] or counts["different"]))


def judged(row: Row) -> tuple[str, str]:
    """What becomes of a row, and why."""
    if issubclass(row.config, Absent):
        return "not in this PEFT", row.config.__name__
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = wrapped(row)
            theirs.save_pretrained(folder)
        except Exception as error:  # whatever PEFT says, the row cannot be made
            return "not expressible in PEFT", f"{type(error).__name__}: {str(error)[:150]}"
        ours = row.build().eval()
        try:
            load_adapter(ours, folder)
        except AdapterFileError as error:
            named = any(word in str(error) for word in missing_features(theirs.peft_config["default"], ours))
            return ("refused by name" if named else "refused wrongly"), str(error).replace(folder, "FOLDER")[:300]
        except Exception:  # a crash is a wrong refusal, and the next row is still to be tried
            return "refused wrongly", traceback.format_exc(limit=-2)
        problems = list(differences(row, theirs, ours, Path(folder)))
    if problems and all(problem.startswith(PEFT_IS_WRONG) for problem in problems):
        return PEFT_IS_WRONG, problems[0]
    return ("different", "; ".join(problems)) if problems else ("equal", "")


def wrapped(row: Row) -> Any:
    """PEFT's model of the row, with random factors."""
    settings = dict(row.settings)
    if row.config is peft.LoraConfig:
        settings.setdefault("init_lora_weights", False)
    theirs: Any = peft.get_peft_model(row.build(), row.config(**settings)).eval()
    fill(theirs)
    return theirs


def fill(theirs: nn.Module) -> None:
    """Give factors, and modules that PEFT trains in full, random values of a size that keeps outputs moderate."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif "modules_to_save.default" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def missing_features(config: Any, base: nn.Module) -> Iterator[str]:
    """The words one of which the refusal of a config must hold; none if it must be loaded."""
    if config.peft_type != "LORA":
        yield repr(config.peft_type.value)
        return
    plain = {field.name: field.default for field in fields(peft.LoraConfig)}
    yield from (name for name in FEATURES if getattr(config, name, None) not in (plain.get(name), None))
    if config.bias != "none":
        yield "bias="
    if str(config.init_lora_weights).startswith(BASE_CHANGING_INITS):
        yield "init_lora_weights"
    convolutions = [module for module in base.modules() if isinstance(module, nn.modules.conv._ConvNd)]
    if any(module.groups > 1 for module in convolutions):
        yield "groups="


def differences(row: Row, theirs: Any, ours: nn.Module, folder: Path) -> Iterator[str]:
    """What PEFT's model and ours compute differently."""
    expected, found = outputs(theirs), outputs(ours)
    yield from _unequal("output", expected, found)
    wrong = list(_gradient_differences(theirs, ours, expected, found, row, folder))
    slopes = (slope_error(theirs), slope_error(ours)) if wrong else (0.0, 0.0)
    if slopes[0] > SLOPE_TOLERANCE >= slopes[1]:
        yield f"{PEFT_IS_WRONG}: its gradient is {slopes[0]:.0%} off its own finite differences, ours {slopes[1]:.1%}"
    else:
        yield from wrong
    merge_lora(ours)
    yield from _unequal("output after merging", found, outputs(ours))
    merged = theirs.merge_and_unload()
    yield from _unequal("output after merging in PEFT", outputs(merged), outputs(ours))
    if isinstance(base := row.build(), PreTrainedModel):
        base.save_pretrained(folder / "base")
        merge_files(folder / "base", folder, folder / "merged", allow_other_base=True)
        again = type(base).from_pretrained(folder / "merged").eval()
        yield from _unequal("output after merging on disk", outputs(merged), outputs(again))


def outputs(model: Any) -> Tensor:
    """The output of a model for a fixed input, with gradients."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        return model(torch.arange(90).view(9, 10))
    tokens = torch.arange(16).reshape(2, 8) * 7 % 60 + 3
    inputs: dict[str, Any] = {"input_ids": tokens}
    if base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens.flip(1)
    result = model(**inputs)
    return result["logits"] if "logits" in result else result["last_hidden_state"]


def _unequal(what: str, expected: Tensor, found: Tensor) -> Iterator[str]:
    if expected.shape != found.shape:
        yield f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}"
        return
    error = float((expected - found).detach().abs().max() / expected.detach().abs().max().clamp(min=1e-12))
    if not error <= TOLERANCE:
        yield f"{what}: off by {error:.1e}"


def _gradient_differences(
    theirs: Any, ours: nn.Module, expected: Tensor, found: Tensor, row: Row, folder: Path
) -> Iterator[str]:
    """Compare gradients: PEFT's are saved as an adapter, so that loading brings them into our names and layouts."""
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in theirs.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    }
    state = peft.get_peft_model_state_dict(theirs, state_dict=theirs.state_dict() | gradients)
    copy = folder / "gradients"
    copy.mkdir()
    (copy / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, copy / TENSOR_FILE)
    reference = row.build()
    load_adapter(reference, copy)
    halved = {f"{name}.out_proj.lora_B" for name, module in ours.named_modules() if _is_attention(module)}
    expected_by_name = lora_state_dict(reference)
    for name, parameter in ours.named_parameters():
        if name in expected_by_name:
            # Reading doubles this factor, see `peft_layers`; its gradient is half of PEFT's.
            factor = 0.25 if name in halved else 1.0
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            yield from _unequal(f"gradient of {name}", expected_by_name[name] * factor, own)


def slope_error(model: nn.Module) -> float:
    """How far the gradients of a model's factors are from finite differences of its own output, relatively."""
    factors = [p for name, p in model.named_parameters() if "lora_" in name and p.requires_grad]
    generator = torch.Generator().manual_seed(3)
    steps = [1e-3 * torch.randn(factor.shape, generator=generator) for factor in factors]
    weights = torch.randn(outputs(model).shape, generator=torch.Generator().manual_seed(2))
    slope = sum(
        float((factor.grad * step).sum())
        for factor, step in zip(factors, steps, strict=True)
        if factor.grad is not None
    )
    sums = []
    with torch.no_grad():
        for sign in (1, -2):
            for factor, step in zip(factors, steps, strict=True):
                factor += sign * step
            sums.append(float((outputs(model) * weights).double().sum()))
        for factor, step in zip(factors, steps, strict=True):
            factor += step
    return abs(slope - (sums[0] - sums[1]) / 2) / max(abs(slope), 1e-12)


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention)


if __name__ == "__main__":
    sys.exit(main())
