"""Mixed precision holds the frozen base of a task in the type that it multiplies in, and nothing else changes."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from lightning_lora import LoRAConfig, count_parameters, lora_layers
from lightning_lora.callbacks import LoRA, LoRAGuard, MergeOnFitEnd
from lightning_lora.lora.fingerprint import base_digests
from lightning_lora.lora.layers.adapted import factor_parameters
from lightning_lora.memory.step_trace import trace_step
from lightning_lora.tasks import CausalLM, SequenceClassifier
from tests.support import moe_models, toys
from tests.tasks.conftest import LORA, StopAfterEpoch, fit, make, token_loader

pytestmark = [pytest.mark.slow, *toys.expected_warnings]
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _alone() -> None:
    """Without the models of earlier tests: runs that are compared to the bit share nothing with them."""
    gc.collect()


def gpt2(**settings: Any) -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=320, n_positions=64, **settings))


class Casts(Callback):
    """Counts the casts of frozen weights in training steps, forward and backward."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        frozen = {p.untyped_storage().data_ptr() for p in pl_module.parameters() if not p.requires_grad}
        callback = self

        class Counting(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func is torch.ops.aten._to_copy.default and args[0].untyped_storage().data_ptr() in frozen:
                    callback.count += 1
                return func(*args, **(kwargs or {}))

        self._mode = Counting()
        self._mode.__enter__()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._mode.__exit__(None, None, None)


MODELS: dict[str, Callable[[], PreTrainedModel] | dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "with biases": {"attention_bias": True, "mlp_bias": True},
    "gpt2": gpt2,
    "experts": lambda: moe_models.moe("qwen3_moe", vocab_size=320),
}


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    made = MODELS[request.param]
    if isinstance(made, dict):
        return toys.save_llama(tmp_path / "model", **made)
    made().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def casts(folder: Path, tmp_path: Path, **options: Any) -> int:
    counting = Casts()
    fit(make(folder, **options), tmp_path, precision="bf16-mixed", callbacks=[counting])
    return counting.count


def test_no_frozen_weight_is_cast_in_a_step(folder: Path, tmp_path: Path) -> None:
    assert casts(folder, tmp_path) == 0
    assert casts(folder, tmp_path, dtype="float32") > 0


def types(parameters: Any) -> set[torch.dtype]:
    return {parameter.dtype for parameter in parameters}


def trained(module: LightningModule) -> list[nn.Parameter]:
    factors = {id(factor) for factor in factor_parameters(module).values()}
    return [p for p in module.parameters() if p.requires_grad and id(p) not in factors]


def frozen(module: LightningModule) -> list[nn.Parameter]:
    return [p for p in module.parameters() if not p.requires_grad]


def scaled(precision: str) -> dict[str, Any]:
    """16-mixed on a CPU, which Lightning's own flag refuses."""
    if precision == "bf16-mixed":
        return {"precision": precision}
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}  # pyright: ignore


@pytest.mark.parametrize(("precision", "held"), [("bf16-mixed", BF16), ("16-mixed", torch.float16)])
@pytest.mark.parametrize("trainable", [(), ("layers.1.mlp.up_proj", "model.norm")])
def test_what_is_frozen_is_held_and_what_is_trained_stays_float32(
    trainable: tuple[str, ...], precision: str, held: torch.dtype, llama_folder: Path, tmp_path: Path, caplog: Any
) -> None:
    module = make(llama_folder, lora=LoRAConfig(rank=2, trainable=trainable))
    with caplog.at_level("INFO"):
        fit(module, tmp_path, callbacks=[LoRAGuard()], **scaled(precision))
    assert types(frozen(module)) == {held}
    assert types(factor_parameters(module).values()) == {torch.float32}
    assert types(trained(module)) == ({torch.float32} if trainable else set())
    assert all(buffer.dtype != held for buffer in module.buffers())
    name = str(held).removeprefix("torch.")
    (line,) = [record.message for record in caplog.records if record.message.startswith("base: ")]
    size = sum(p.nbytes for p in frozen(module)) / 1e6
    assert line == (
        f"base: {size:,.1f} MB of frozen weights held in {name}, which products are computed in (dtype: float32 keeps "
        "float32)"
    )


@pytest.mark.parametrize("merged", [False, True])
def test_a_module_that_was_built_before_is_held_too_unless_it_is_merged(
    merged: bool, llama_folder: Path, tmp_path: Path
) -> None:
    module = make(llama_folder)
    module.configure_model()
    if merged:
        module.merge_lora()
    toys.trainer(tmp_path, precision="bf16-mixed").validate(module, token_loader(), verbose=False)
    assert types(frozen(module)) == {torch.float32 if merged else BF16}


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"lora": None}])
def test_float32_stays_where_it_is_asked_for_and_in_full_fine_tuning(
    options: dict[str, Any], llama_folder: Path, tmp_path: Path, caplog: Any
) -> None:
    module = make(llama_folder, **options)
    with caplog.at_level("INFO"):
        fit(module, tmp_path, precision="bf16-mixed")
    assert types(module.parameters()) == {torch.float32}
    assert "frozen weights held" not in caplog.text


def test_modules_trained_in_full_start_from_the_values_of_the_files(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder, lora=LoRAConfig(rank=2, trainable=("lm_head",)), learning_rate=1e-30)
    fit(module, tmp_path, precision="bf16-mixed")
    stored = AutoModelForCausalLM.from_pretrained(llama_folder)
    assert torch.equal(module.get_submodule("model.lm_head").weight, stored.lm_head.weight)  # pyright: ignore


def test_a_new_head_and_norms_that_autocast_widens_stay_float32(tmp_path: Path) -> None:
    gpt2(pad_token_id=0).save_pretrained(tmp_path / "model")
    module = SequenceClassifier(str(tmp_path / "model"), 3, learning_rate=1e-3, lora=LORA)
    rows = [row | {"labels": torch.tensor(index % 3)} for index, row in enumerate(toys.token_rows())]
    loader: Any = DataLoader(rows, batch_size=4)  # pyright: ignore[reportArgumentType]
    toys.trainer(tmp_path, precision="bf16-mixed", callbacks=[LoRAGuard()]).fit(module, loader)
    assert module.model is not None
    assert types(trained(module)) == {torch.float32}
    norms = [p for layer in module.model.modules() if isinstance(layer, nn.LayerNorm) for p in layer.parameters()]
    assert len(norms) == 10
    assert types(norms) == {torch.float32}
    assert types(p for p in frozen(module) if id(p) not in set(map(id, norms))) == {BF16}
    # Outside of a Trainer there is no autocast, and types differ.
    batch = next(iter(loader))
    inside = toys.trainer(tmp_path, precision="bf16-mixed").predict(module, loader)
    assert inside is not None
    assert torch.equal(inside[0], module(batch["input_ids"], batch["attention_mask"]).argmax(-1))  # pyright: ignore
    assert not torch.is_autocast_enabled("cpu")


def losses(folder: Path, tmp_path: Path, **options: Any) -> list[Tensor]:
    torch.manual_seed(0)
    module, found = make(folder, **options), []

    class Keep(Callback):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            found.append(args[2]["loss"])

    fit(module, tmp_path, precision="bf16-mixed", callbacks=[Keep()])
    return found


def test_a_run_computes_as_on_a_base_of_the_same_type(llama_folder: Path, tmp_path: Path) -> None:
    held, same = losses(llama_folder, tmp_path), losses(llama_folder, tmp_path, dtype="bfloat16")
    wide = losses(llama_folder, tmp_path, dtype="float32")
    assert torch.equal(torch.stack(held), torch.stack(same))
    torch.testing.assert_close(torch.stack(held), torch.stack(wide), rtol=2e-2, atol=0)


@pytest.mark.parametrize("trainable", [(), ("lm_head",)])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_a_run_resumes_bit_for_bit_on_a_base_with_the_same_fingerprint(
    precision: str, trainable: tuple[str, ...], llama_folder: Path, tmp_path: Path
) -> None:
    lora = LoRAConfig(rank=2, trainable=trainable)
    whole, half, rest = (make(llama_folder, lora=lora) for _ in range(3))
    torch.manual_seed(0)
    fit(whole, tmp_path, max_epochs=2, **scaled(precision))
    torch.manual_seed(0)
    runner = fit(half, tmp_path, max_epochs=2, callbacks=[StopAfterEpoch()], **scaled(precision))
    runner.save_checkpoint(tmp_path / "half.ckpt")
    fit(rest, tmp_path, max_epochs=2, ckpt_path=tmp_path / "half.ckpt", **scaled(precision))
    assert toys.same(toys.snapshot(whole), toys.snapshot(rest))
    # Also on a float32 base, which has the same digests; an adapter does not load on another.
    loaded = CausalLM.load_from_checkpoint(tmp_path / "half.ckpt", weights_only=True)
    assert types(loaded.parameters()) == {torch.float32}
    names = {name for name, p in loaded.named_parameters() if p.requires_grad}
    if precision == "bf16-mixed":
        assert base_digests(loaded, names) == base_digests(whole, names)


@pytest.mark.parametrize("stored", [torch.float32, BF16])
@pytest.mark.parametrize("trainable", [(), ("model.norm",)])
def test_the_merged_model_has_the_type_of_the_files(
    trainable: tuple[str, ...], stored: torch.dtype, llama_folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama_folder, source)
    AutoModelForCausalLM.from_pretrained(llama_folder, dtype=stored).save_pretrained(source)
    module = make(source, lora=LoRAConfig(rank=2, trainable=trainable))
    fit(module, tmp_path, precision="bf16-mixed", callbacks=[MergeOnFitEnd(str(tmp_path / "merged"))])
    assert module.model is not None
    assert types(frozen(module)) == {BF16}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert types(merged.parameters()) == {stored}
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        mine, written = (model.eval().float()(input_ids=ids).logits.float() for model in (module.model, merged))
    torch.testing.assert_close(written, mine, rtol=0, atol=1e-6 if stored is torch.float32 and not trainable else 2e-2)


@pytest.mark.parametrize("trainable", [(), ("lm_head",)])
def test_a_plan_counts_the_weights_as_they_are_held(
    trainable: tuple[str, ...], llama_folder: Path, tmp_path: Path
) -> None:
    module = make(llama_folder, lora=LoRAConfig(rank=2, trainable=trainable))
    batch = next(iter(token_loader()))
    planned = trace_step(module, batch, precision="bf16-mixed").memory
    fit(module, tmp_path, precision="bf16-mixed")
    assert planned.adapters == 4 * count_parameters(module).adapter
    buffers = sum(buffer.nbytes for buffer in module.buffers())
    own = sum(p.nbytes for p in [*frozen(module), *trained(module)]) + buffers
    # Nothing beside the held weights but copies of the values that training in full will change.
    assert own <= planned.weights <= own + sum(p.nbytes for p in trained(module))


def test_a_base_too_large_for_float16_stays_float32_with_a_warning(llama_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = -65_520.0
    model.save_pretrained(tmp_path / "model")
    module = make(tmp_path / "model")
    said = r"1 frozen weights are too large for float16 \(model.layers.1.mlp.up_proj.weight\)"
    trainer = toys.trainer(tmp_path, limit_train_batches=0, **scaled("16-mixed"))
    with pytest.warns(UserWarning, match=said):
        trainer.fit(module, token_loader())
    assert types(module.parameters()) == {torch.float32}


@pytest.mark.parametrize("asked", [False, True])
def test_the_callback_holds_the_base_of_any_module_if_asked(asked: bool, tmp_path: Path) -> None:
    module = toys.Plain()
    callback = LoRA(LoRAConfig(rank=2), autocast_base=asked)
    toys.fit(module, tmp_path, precision="bf16-mixed", callbacks=[callback])
    assert {layer.weight.dtype for layer in lora_layers(module).values()} == {BF16 if asked else torch.float32}
