"""The loss computed in place of the output layer: the same numbers, and only if the model allows it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig, inject_lora, lora_layers
from lightning_lora.callbacks import LoRAGuard
from lightning_lora.tasks import CausalLM, head_chunks
from lightning_lora.tasks.loss_at_head import plain_head
from tests.architectures.decoders import GROUPED, SHAPE, VOCAB
from tests.support import tiny_models, toys
from tests.tasks.test_head_loss import Largest

pytestmark = toys.expected_warnings

LORA = LoRAConfig(rank=2)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_chunks, "CHUNK_ROWS", 8)


class Usual(CausalLM):
    """A task that always computes the logits."""

    _head_is_last = False


def rows(vocab: int = VOCAB, count: int = 8) -> Any:
    return DataLoader(toys.token_rows(count, vocab=vocab), batch_size=4)  # pyright: ignore[reportArgumentType]


def trained(kind: type[CausalLM], folder: Path, tmp_path: Path, **options: Any) -> tuple[CausalLM, dict[str, Any]]:
    """A module after two optimizer steps of two micro-batches, and its metrics; no factor starts at zero."""
    settings = {"max_epochs": 2, "accumulate_grad_batches": 2, "num_sanity_val_steps": 0}
    torch.manual_seed(0)
    lora = options.pop("lora", LORA)
    module = kind(str(folder), learning_rate=1e-3, lora=lora)
    module.configure_model()
    tiny_models.wake(module, size=0.2)
    runner = toys.trainer(tmp_path, **(settings | options))
    runner.fit(module, rows(), rows())
    return module, {name: float(value) for name, value in runner.callback_metrics.items()}


def llama_folder(tmp_path: Path, **settings: Any) -> Path:
    tiny_models.llama(**settings).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


SAME = {
    "plain": {},
    "adapted head": {"lora": LoRAConfig(rank=2, adapt_head=True)},
    "in full": {"lora": None},
    "trained head": {"lora": LoRAConfig(rank=2, trainable=["lm_head"])},
    "dropout": {"lora": LoRAConfig(rank=2, dropout=0.3)},
    "autocast": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("options", SAME.values(), ids=SAME)
def test_a_run_is_the_one_with_logits(options: dict[str, Any], tmp_path: Path) -> None:
    folder = llama_folder(tmp_path)
    (ours, found), (usual, expected) = (trained(kind, folder, tmp_path, **options) for kind in (CausalLM, Usual))
    assert ours._head_is_last
    # AdamW divides by the size of a gradient: where one nearly vanishes, the order of a sum shows.
    rtol, atol = (1e-2, 1e-3) if "precision" in options else (1e-4, 3e-5)
    assert found.keys() == expected.keys() >= {"train_loss", "val_loss", "val_perplexity", "val_accuracy"}
    # A perplexity is off by as much, relatively, as its loss is absolutely.
    assert found == pytest.approx(expected, rel=3 * rtol)
    torch.testing.assert_close(ours.state_dict(), usual.state_dict(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("adapt_head", [False, True])
def test_gradients_are_those_with_logits(adapt_head: bool, tmp_path: Path) -> None:
    folder, batch = llama_folder(tmp_path), next(iter(rows()))
    found = []
    for kind in (CausalLM, Usual):
        torch.manual_seed(0)
        module = kind(str(folder), lora=LoRAConfig(rank=2, adapt_head=adapt_head))
        module.configure_model()
        tiny_models.wake(module, size=0.2)
        losses: list[Tensor] = []
        module.log = module.token_loss = lambda *values, kept=losses, **_: kept.append(values[0])  # type: ignore
        module.training_step(batch, 0)
        losses[-1].backward()
        found.append((losses[-1].detach(), {n: p.grad for n, p in module.named_parameters() if p.requires_grad}))
    (loss, gradients), (expected_loss, expected) = found
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert sum(gradient.any() for gradient in gradients.values() if gradient is not None) == len(gradients)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


GEMMA = GROUPED | {"head_dim": 8, "sliding_window": 8}
# Class, config, settings, and whether the logits are the output layer's very output.
MODELS: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, True),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 8}, True),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SHAPE, True),
    "phi, biased head": ("PhiForCausalLM", "PhiConfig", GROUPED, True),
    "gemma 3, no cap": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA, True),
    "minicpm 3, scaled before": ("MiniCPM3ForCausalLM", "MiniCPM3Config", SHAPE | {
        "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }, True),
    "gemma 2, capped": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA | {"final_logit_softcapping": 0.5}, False),
    "gemma 3, capped": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA | {"final_logit_softcapping": 0.5}, False),
    "cohere, scaled": ("CohereForCausalLM", "CohereConfig", GROUPED | {"logit_scale": 3.0}, False),
    "granite, scaled": ("GraniteForCausalLM", "GraniteConfig", GROUPED | {"logits_scaling": 0.25}, False),
}  # fmt: skip


@pytest.mark.parametrize(("model", "config", "settings", "is_last"), MODELS.values(), ids=MODELS)
def test_what_a_model_does_to_its_logits_is_never_dropped(
    model: str, config: str, settings: dict[str, Any], is_last: bool, tmp_path: Path
) -> None:
    reference: Any = getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()
    # Scores far from zero, where a cap bites.
    reference.get_output_embeddings().weight.data.normal_(std=0.5)
    reference.save_pretrained(tmp_path / "model")
    module = CausalLM(str(tmp_path / "model"))
    (measured,) = toys.trainer(tmp_path).validate(module, rows(count=4), verbose=False)
    assert module._head_is_last is is_last
    batch = next(iter(rows(count=4)))
    with torch.no_grad():
        logits = reference(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert measured["val_loss"] == pytest.approx(float(loss), rel=1e-5)
    hits = (logits.argmax(-1) == labels)[labels != -100].float().mean()
    assert measured["val_accuracy"] == pytest.approx(float(hits))


class Doubled(CausalLM):
    """A user's task that changes the logits."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # pyright: ignore
        return 2 * super().forward(input_ids, attention_mask)


def hooked(module: CausalLM) -> None:
    head: Any = module.model and module.model.get_output_embeddings()
    head.register_forward_hook(lambda _module, _args, output: 2 * output)


@pytest.mark.parametrize("kind", [Doubled, CausalLM])
def test_what_a_user_does_to_the_logits_is_never_dropped(kind: type[CausalLM], tmp_path: Path) -> None:
    folder = llama_folder(tmp_path)
    plain, doubled = CausalLM(str(folder)), kind(str(folder))
    for module in (plain, doubled):
        module.configure_model()
    if kind is CausalLM:
        hooked(doubled)
    losses = [toys.trainer(tmp_path).validate(m, rows(), verbose=False)[0]["val_loss"] for m in (plain, doubled)]
    batch = next(iter(DataLoader(toys.token_rows(8, vocab=VOCAB), batch_size=8)))  # pyright: ignore
    with torch.no_grad():
        logits = 2 * plain(batch["input_ids"], batch["attention_mask"])[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert losses[1] == pytest.approx(float(expected), rel=1e-5)
    assert not math.isclose(losses[0], losses[1], rel_tol=1e-3)


class Late(CausalLM):
    """A task that changes the logits, but not those of the two tokens with which it is tested."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # pyright: ignore
        logits = super().forward(input_ids, attention_mask)
        return logits if input_ids.shape[1] == 2 else 2 * logits


def test_a_change_of_the_logits_is_noticed_when_it_happens(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path)
    late, doubled = Late(str(folder)), Doubled(str(folder))
    losses = [toys.trainer(tmp_path).validate(m, rows(), verbose=False)[0]["val_loss"] for m in (late, doubled)]
    assert losses[0] == losses[1]
    assert late._head_is_last is False


def test_an_adapted_head_is_seen_by_the_guard(tmp_path: Path) -> None:
    lora = LoRAConfig(rank=2, adapt_head=True)
    module, _ = trained(CausalLM, llama_folder(tmp_path), tmp_path, lora=lora, callbacks=[LoRAGuard(patience=1)])
    assert module._head_is_last
    assert "model.lm_head" in lora_layers(module)
    assert all(toys.moved(module))


def test_a_training_run_holds_no_logits(tmp_path: Path) -> None:
    vocab = 200
    folder = llama_folder(tmp_path, vocab_size=vocab, hidden_size=16)
    largest = {}
    for kind in (CausalLM, Usual):
        module = kind(str(folder), lora=LORA)
        module.configure_model()
        with Largest() as seen:
            toys.trainer(tmp_path, max_steps=1).fit(module, rows(), rows())
        largest[kind] = seen.numel
    # Rows and tokens of a batch, against the embedding table (or a chunk).
    assert largest[Usual] == 4 * 10 * vocab
    assert largest[CausalLM] <= vocab * 16


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_get_their_logits(whole: bool, tmp_path: Path) -> None:
    module = CausalLM(str(llama_folder(tmp_path)))
    module.configure_model()
    assert module.model is not None
    eager = toys.trainer(tmp_path).validate(module, rows(), verbose=False)[0]["val_loss"]
    assert module._head_is_last
    target: Any = module.model if whole else module.model.get_output_embeddings()
    target.compile(backend="eager")
    module._head_is_last = None
    compiled = toys.trainer(tmp_path).validate(module, rows(), verbose=False)[0]["val_loss"]
    assert module._head_is_last is None
    assert compiled == pytest.approx(eager, rel=1e-6)


def test_checkpointed_blocks_train_the_same(tmp_path: Path) -> None:
    folder, states = llama_folder(tmp_path), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = CausalLM(str(folder), lora=LORA)
        module.configure_model()
        assert module.model is not None
        if checkpointing:
            turn_on = getattr(module.model, "activation_checkpointing_enable", None)  # its name since transformers 5.24
            (turn_on or module.model.gradient_checkpointing_enable)()
        toys.trainer(tmp_path, max_steps=2).fit(module, rows())
        assert module._head_is_last
        states.append(module.state_dict())
    torch.testing.assert_close(states[0], states[1])


def test_a_head_with_a_magnitude_computes_its_logits() -> None:
    # The loss by rows knows ``W`` and ``B A``, and not the factor on their sum.
    for adapt_head in (False, True):
        model = tiny_models.llama()
        inject_lora(model, LoRAConfig(rank=2, adapt_head=adapt_head, dora=True))
        assert (plain_head(model) is None) is adapt_head
