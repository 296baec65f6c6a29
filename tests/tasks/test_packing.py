"""Packed examples train exactly what padded ones do, and a model that mixes them is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets.config
import pytest
import torch
import transformers
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import find_packed_sequence_indices

from lightning_lora import LoRAConfig
from lightning_lora.data import SFTDataModule
from lightning_lora.data.collate import Collate, CollateEvenly, CollatePacked
from lightning_lora.errors import ConfigError, DataError
from lightning_lora.tasks import CausalLM
from tests.architectures.decoders import GROUPED, SHAPE
from tests.support import tiny_models, toys
from tests.support.moe_models import moe

pytestmark = [
    *toys.expected_warnings,
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# Function that builds a model, its attention.
MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "llama, sdpa": (tiny_models.llama, "sdpa"),
    "llama, eager": (tiny_models.llama, "eager"),
    "gpt2": (lambda: tiny_models.gpt2(n_positions=64, **NO_DROPOUT), "sdpa"),
    "olmoe": (lambda: moe("olmoe"), "sdpa"),
    "mistral, sliding": (lambda: build("MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": 4}), "sdpa"),
}
LENGTHS = (7, 3, 12, 5, 1, 9, 2, 11)


def build(model: str, config: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()


def save(model: Any, folder: Path, attention: str = "sdpa") -> Path:
    model.config._attn_implementation = attention
    model.save_pretrained(folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("{", f'{{"attn_implementation": "{attention}",', 1))
    return folder


def examples(seed: int = 0, lengths: Sequence[int] = LENGTHS) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(3, tiny_models.VOCAB, (length,), generator=generator)
        supervised = torch.rand(length, generator=generator) < 0.6
        supervised[0] = False
        rows.append({"input_ids": ids.numpy(), "supervised": supervised.numpy()})
    return rows


def in_packs(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Packs of different numbers of examples, an empty one among them."""
    return [rows[:3], rows[3:4], rows[4:], []]


LAYOUTS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "padded": lambda rows: DataLoader(rows, 4, collate_fn=Collate(0)),  # pyright: ignore
    "even rows": lambda rows: DataLoader(rows, 4, collate_fn=CollateEvenly(0)),  # pyright: ignore
    "packs": lambda rows: DataLoader(in_packs(rows), 2, collate_fn=CollatePacked(0)),  # pyright: ignore
}


def one_row(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return CollatePacked(0)([rows])


def ready(batches: list[Any]) -> Any:
    return DataLoader(batches, batch_size=None)  # pyright: ignore


class Recorded(CausalLM):
    """Remembers the gradients of every step as the optimizer gets them, and the summed loss of every micro-batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gradients: list[dict[str, Tensor]] = []
        self.losses: list[float] = []

    def token_loss(self, loss_sum: Tensor, num_tokens: Tensor) -> Tensor:
        self.losses.append(float(loss_sum.detach()))
        return super().token_loss(loss_sum, num_tokens)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(*args, **kwargs)
        named = {name: p.grad for name, p in self.named_parameters()}
        self.gradients.append({name: grad.clone() for name, grad in named.items() if grad is not None})


class WithLogits(Recorded):
    """Never computes the loss in the place of the head."""

    _head_is_last = False


def trained(folder: Path, tmp_path: Path, loader: Any, kind: type[Recorded] = Recorded, **options: Any) -> Recorded:
    torch.manual_seed(0)
    module = kind(str(folder), learning_rate=1e-4, lora=options.pop("lora", LoRAConfig(rank=4)))
    module.configure_model()
    tiny_models.wake(module, size=0.2)
    toys.trainer(tmp_path, **({"accumulate_grad_batches": 2} | options)).fit(module, loader)
    return module


def assert_same_training(found: Recorded, expected: Recorded) -> None:
    assert sum(found.losses) == pytest.approx(sum(expected.losses), rel=1e-5)
    assert len(found.gradients) == len(expected.gradients) >= 1
    ours, theirs = found.gradients[0], expected.gradients[0]
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient.any(), name
        # Of a few dozen numbers each; sums in float32 in another order differ by a little more than losses do.
        assert (ours[name] - gradient).norm() <= 3e-5 * gradient.norm(), name


@pytest.mark.parametrize("layout", ["even rows", "packs"])
@pytest.mark.parametrize(("model", "attention"), MODELS.values(), ids=MODELS)
def test_loss_and_gradients_are_those_of_padded_rows(
    model: Callable[[], Any], attention: str, layout: str, tmp_path: Path
) -> None:
    folder = save(model(), tmp_path / "model", attention)
    expected = trained(folder, tmp_path, LAYOUTS["padded"](examples()))
    found = trained(folder, tmp_path, LAYOUTS[layout](examples()))
    assert found.model is not None
    assert found.model.config._attn_implementation == attention
    assert found._head_is_last
    assert_same_training(found, expected)


@pytest.mark.parametrize("layout", ["even rows", "packs"])
def test_loss_and_gradients_are_the_same_from_logits(layout: str, tmp_path: Path) -> None:
    folder = save(tiny_models.llama(), tmp_path / "model")
    expected = trained(folder, tmp_path, LAYOUTS["padded"](examples()), WithLogits)
    assert_same_training(trained(folder, tmp_path, LAYOUTS[layout](examples()), WithLogits), expected)


def test_even_rows_train_the_same_adapters(tmp_path: Path) -> None:
    folder = save(tiny_models.llama(), tmp_path / "model")
    padded, packed = (
        trained(folder, tmp_path, LAYOUTS[layout](examples()), max_epochs=4, accumulate_grad_batches=1)
        for layout in ("padded", "even rows")
    )
    # AdamW makes steps of a size of their own, 1e-3 here, out of the rounding of gradients near zero.
    torch.testing.assert_close(packed.state_dict(), padded.state_dict(), rtol=0, atol=2e-5)
    assert packed.losses == pytest.approx(padded.losses, rel=1e-5)
    assert len(packed.gradients) == 8


def packed_logits(module: CausalLM, rows: list[dict[str, Any]]) -> list[Tensor]:
    """Of each example of one row."""
    batch = one_row(rows)
    with torch.no_grad():
        logits = module(batch["input_ids"], position_ids=batch["position_ids"])[0]
    return list(logits.split([len(row["input_ids"]) for row in rows]))


@pytest.mark.parametrize(("model", "attention"), MODELS.values(), ids=MODELS)
def test_no_example_changes_the_logits_of_another(model: Callable[[], Any], attention: str, tmp_path: Path) -> None:
    module = CausalLM(str(save(model(), tmp_path / "model", attention)), lora=LoRAConfig(rank=4))
    module.configure_model()
    tiny_models.wake(module, size=0.2)
    module.eval()
    rows = examples()
    before = packed_logits(module, rows)
    for changed in (0, 2, len(rows) - 1):
        others = [examples(seed=1)[i] if i == changed else row for i, row in enumerate(rows)]
        after = packed_logits(module, others)
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            moved = (one - other).abs().max()
            assert moved > 1e-3 if index == changed else moved <= 1e-6, (changed, index)


def test_examples_see_each_other_without_positions(tmp_path: Path) -> None:
    """The tests above can fail: this is what they would see."""
    folder = save(tiny_models.llama(), tmp_path / "model")
    loader = LAYOUTS["even rows"](examples())
    batches = [{"input_ids": b["input_ids"], "labels": b["labels"], "attention_mask": None} for b in loader]
    broken = trained(folder, tmp_path, ready(batches))
    expected = trained(folder, tmp_path, LAYOUTS["padded"](examples()))
    with pytest.raises(AssertionError):
        assert_same_training(broken, expected)


def test_the_first_token_of_an_example_is_never_predicted_from_another(tmp_path: Path) -> None:
    folder = save(tiny_models.llama(), tmp_path / "model")
    clean = one_row(examples())
    # What other collators make: every token is its own label, the first of an example too.
    labelled = clean | {"labels": torch.where(clean["position_ids"] == 0, clean["input_ids"], clean["labels"])}
    assert not torch.equal(labelled["labels"], clean["labels"])
    one, other = (trained(folder, tmp_path, ready([batch]), accumulate_grad_batches=1) for batch in (clean, labelled))
    assert one.losses == other.losses
    torch.testing.assert_close(one.gradients, other.gradients, rtol=0, atol=0)


def test_a_batch_with_mask_and_positions_is_refused(tmp_path: Path) -> None:
    folder = save(tiny_models.llama(), tmp_path / "model")
    batch = one_row(examples())
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with pytest.raises(DataError, match=r"attention_mask .padded rows. or position_ids .packed rows., not both"):
        trained(folder, tmp_path, ready([batch]), accumulate_grad_batches=1)


SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32}
LEAKING: dict[str, Callable[[], Any]] = {
    "mamba, recurrence": lambda: build(
        "MambaForCausalLM", "MambaConfig", SMALL | {"state_size": 4, "num_hidden_layers": 2}
    ),
    "lfm2, convolution": lambda: build(
        "Lfm2ForCausalLM", "Lfm2Config", GROUPED | {"layer_types": ["conv", "full_attention"]}
    ),
    "qwen3-next, both": lambda: moe("qwen3_next"),
    "bloom, alibi": lambda: build("BloomForCausalLM", "BloomConfig", SMALL | {"n_layer": 2, "n_head": 4}),
    "gpt-oss, masks without positions": lambda: moe("gpt_oss"),
    "roberta, positions from 2": lambda: build("RobertaForCausalLM", "RobertaConfig", SHAPE | {"is_decoder": True}),
}


@pytest.mark.parametrize("model", LEAKING.values(), ids=LEAKING)
def test_a_model_that_mixes_examples_is_refused(model: Callable[[], Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model().save_pretrained(folder)
    for layout in ("even rows", "packs"):
        with pytest.raises(ConfigError, match=r"does not keep packed examples apart: .*Turn packing off") as caught:
            trained(folder, tmp_path, LAYOUTS[layout](examples()), lora=None)
        assert "ForCausalLM" in str(caught.value)
    trained(folder, tmp_path, LAYOUTS["padded"](examples()), lora=None)


def one_row_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """As FlashAttention in transformers: examples are looked for in the positions of a batch of one row."""
    assert mask is None
    positions, length = kwargs["position_ids"], query.shape[2]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    if len(query) == 1:
        found = find_packed_sequence_indices(positions)
        mask = mask if found is None else mask & (found[0][:, None] == found[0])
    return sdpa_attention_forward(module, query, key, value, mask[None, None], **kwargs)


@pytest.fixture
def one_row_kernel() -> Any:
    AttentionInterface.register("one_row", one_row_attention)
    AttentionMaskInterface.register("one_row", lambda **_: None)
    yield
    del AttentionInterface._global_mapping["one_row"], AttentionMaskInterface._global_mapping["one_row"]


def test_packs_are_laid_in_one_row_for_a_kernel_that_wants_one(one_row_kernel: None, tmp_path: Path) -> None:
    folder = save(tiny_models.llama(), tmp_path / "model")
    packs = LAYOUTS["packs"](examples())
    runs: list[Recorded] = []
    predicted: list[list[dict[str, Tensor]]] = []
    for attention in ("sdpa", "one_row"):
        module = Recorded(str(folder), learning_rate=1e-4, lora=LoRAConfig(rank=4))
        module.configure_model()
        assert module.model is not None
        module.model.set_attn_implementation(attention)
        tiny_models.wake(module, size=0.2)
        runner = toys.trainer(tmp_path, accumulate_grad_batches=2)
        predicted.append(runner.predict(module, packs) or [])  # pyright: ignore
        runner.fit(module, packs)
        runs.append(module)
    assert [module._separates_rows for module in runs] == [True, False]
    assert_same_training(runs[1], runs[0])
    torch.testing.assert_close(predicted[1], predicted[0], rtol=1e-5, atol=1e-6)


class Probes(CausalLM):
    """Counts forwards, and the ones in eval mode."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        assert self.model is not None
        self.calls.append((self.model.training, torch.is_grad_enabled()))
        return super().forward(*args, **kwargs)


class Frozen(Callback):
    """Keeps a part of the model in eval mode, as a user may."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self.part(pl_module).eval()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        assert not self.part(pl_module).training
        assert pl_module.model.training  # pyright: ignore

    def part(self, pl_module: LightningModule) -> nn.Module:
        return pl_module.model.model.layers[0]  # pyright: ignore


def test_a_run_is_probed_once_and_not_disturbed(tmp_path: Path) -> None:
    module = Probes(str(save(tiny_models.llama(), tmp_path / "model")), lora=LoRAConfig(rank=2, dropout=0.2))
    loader = LAYOUTS["even rows"](examples())
    module.configure_model()
    drawn: list[Tensor] = []
    for epochs in (2, 1):
        module.calls.clear()
        torch.manual_seed(3)
        toys.trainer(tmp_path, max_epochs=epochs, callbacks=[Frozen()]).fit(module, loader)
        drawn.append(torch.rand(1))
        assert sum(not training for training, _ in module.calls) == 2
        assert all(training == gradients for training, gradients in module.calls if not training)
    # The same draws as a run that is not probed: the padded one.
    padded = CausalLM(str(tmp_path / "model"), lora=LoRAConfig(rank=2, dropout=0.2))
    padded.configure_model()
    for epochs, expected in zip((2, 1), drawn, strict=True):
        torch.manual_seed(3)
        toys.trainer(tmp_path, max_epochs=epochs, callbacks=[Frozen()]).fit(padded, LAYOUTS["padded"](examples()))
        assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-true"])
@pytest.mark.parametrize("model", ["llama, sdpa", "gpt2", "olmoe"])
def test_low_precision_is_no_leak(model: str, precision: Any, tmp_path: Path) -> None:
    folder = save(MODELS[model][0](), tmp_path / "model")
    for layout in ("even rows", "packs"):
        module = CausalLM(str(folder), lora=LoRAConfig(rank=2))
        toys.trainer(tmp_path, precision=precision).fit(module, LAYOUTS[layout](examples()))
        assert module._separates_rows


@pytest.mark.parametrize("model", ["mamba, recurrence", "gpt-oss, masks without positions"])
def test_a_leak_shows_in_low_precision(model: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    LEAKING[model]().save_pretrained(folder)
    module = CausalLM(str(folder))
    with pytest.raises(ConfigError, match="does not keep packed examples apart"):
        toys.trainer(tmp_path, precision="bf16-true").fit(module, LAYOUTS["packs"](examples()))


TEXTS = "".join(f'{{"question": "{"what " * (1 + n % 5)}", "answer": "{n}"}}\n' for n in range(22))


@pytest.fixture
def sft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SFTDataModule]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    (tmp_path / "a.jsonl").write_text(TEXTS)
    return lambda **options: SFTDataModule(str(tmp_path / "a.jsonl"), max_length=60, **options)


def test_a_data_module_packs_as_it_pads(sft: Callable[..., SFTDataModule], llama_folder: Path, tmp_path: Path) -> None:
    states = []
    for packing in (False, "batch"):
        torch.manual_seed(0)
        module = CausalLM(str(llama_folder), 1e-3, lora=LoRAConfig(rank=2))
        toys.trainer(tmp_path, max_epochs=2).fit(module, datamodule=sft(packing=packing, batch_size=4))
        states.append(toys.snapshot(module))
    # Twelve steps of up to 1e-2 each.
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=1e-4)


def test_resuming_on_packs_equals_the_uninterrupted_run(
    sft: Callable[..., SFTDataModule], llama_folder: Path, tmp_path: Path
) -> None:
    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = True

    def run(callbacks: list[Callback], ckpt_path: Path | None = None) -> tuple[CausalLM, Trainer]:
        torch.manual_seed(0)
        module = CausalLM(str(llama_folder), 1e-3, lora=LoRAConfig(rank=2))
        runner = toys.trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2, callbacks=callbacks)
        data = sft(packing=True, batch_size=2)
        runner.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return module, runner

    whole, _ = run([])
    _, half = run([Stop()])
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run([], tmp_path / "half.ckpt")
    assert toys.same(toys.snapshot(whole), toys.snapshot(resumed))
