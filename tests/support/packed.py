"""Models, rows and runs for tests of packing, several examples in one row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig
from lightning_lora.data.batches.collate import Collate, CollateEvenly, CollatePacked
from lightning_lora.tasks import CausalLM
from tests.architectures.decoders import GROUPED, SHAPE
from tests.support import tiny_models, toys
from tests.support.moe_models import moe

NARROW: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
GPT: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
BLOCKS: dict[str, Any] = {"mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8}


def build(name: str, config: str, settings: dict[str, Any]) -> Callable[[], Any]:
    """A function that builds a random causal language model of transformers."""

    def model() -> Any:
        torch.manual_seed(0)
        return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, config)(**settings)).eval()

    return model


KEEPS_APART: dict[str, Callable[[], Any]] = {
    "Llama": tiny_models.llama,
    "Llama, eager": lambda: tiny_models.llama(attn_implementation="eager"),
    "Mistral": build("Mistral", "MistralConfig", GROUPED | {"sliding_window": 4}),
    "Qwen3": build("Qwen3", "Qwen3Config", GROUPED | {"head_dim": 8}),
    "Phi-3": build("Phi3", "Phi3Config", GROUPED),
    "Gemma 2": build("Gemma2", "Gemma2Config", GROUPED | {"head_dim": 8, "sliding_window": 4}),
    "Gemma 3": build("Gemma3", "Gemma3TextConfig", GROUPED | {"head_dim": 8, "sliding_window": 4}),
    "GPT-2": tiny_models.gpt2,
    "GPT-NeoX": build("GPTNeoX", "GPTNeoXConfig", SHAPE),
    "GPT-J": build("GPTJ", "GPTJConfig", GPT | {"rotary_dim": 4}),
    "GPT-BigCode": build("GPTBigCode", "GPTBigCodeConfig", GPT),
    **{name: (lambda name=name: moe(name)) for name in ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "llama4")},
}
MIXES: dict[str, Callable[[], Any]] = {
    "Mamba": build("Mamba", "MambaConfig", NARROW | {"state_size": 4}),
    "Mamba 2": build(
        "Mamba2",
        "Mamba2Config",
        NARROW | {"state_size": 4, "head_dim": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "RWKV": build("Rwkv", "RwkvConfig", NARROW),
    "LFM2": build("Lfm2", "Lfm2Config", GROUPED | {"layer_types": ["conv", "full_attention"]}),
    "Jamba": build(
        "Jamba",
        "JambaConfig",
        GROUPED | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
    ),
    "Bamba": build(
        "Bamba", "BambaConfig", GROUPED | BLOCKS | {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_n_groups": 1}
    ),
    "Falcon-H1": build("FalconH1", "FalconH1Config", GROUPED | BLOCKS | {"mamba_d_ssm": 32, "mamba_n_heads": 4}),
    "RecurrentGemma": build(
        "RecurrentGemma",
        "RecurrentGemmaConfig",
        SHAPE | {"num_hidden_layers": 3, "intermediate_size": 96, "lru_width": 32, "attention_window_size": 16},
    ),
    "Qwen3-Next": lambda: moe("qwen3_next"),
    "BLOOM": build("Bloom", "BloomConfig", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "MPT": build("Mpt", "MptConfig", {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "OPT": build("OPT", "OPTConfig", SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "GPT-OSS": lambda: moe("gpt_oss"),
    "RoBERTa": build("Roberta", "RobertaConfig", SHAPE | {"is_decoder": True}),
}

NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# A function that builds the model, and its attention.
MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "llama, sdpa": (tiny_models.llama, "sdpa"),
    "llama, eager": (tiny_models.llama, "eager"),
    "gpt2": (lambda: tiny_models.gpt2(n_positions=64, **NO_DROPOUT), "sdpa"),
    "olmoe": (lambda: moe("olmoe"), "sdpa"),
    "mistral, sliding": (KEEPS_APART["Mistral"], "sdpa"),
}
LENGTHS = (7, 3, 12, 5, 1, 9, 2, 11)


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

    def token_loss(self, loss_sum: Tensor, num_tokens: Tensor | float) -> Tensor:
        self.losses.append(float(loss_sum.detach()))
        return super().token_loss(loss_sum, num_tokens)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(*args, **kwargs)
        named = {name: p.grad for name, p in self.named_parameters()}
        self.gradients.append({name: grad.clone() for name, grad in named.items() if grad is not None})


def trained(folder: Path, tmp_path: Path, loader: Any, kind: type[Recorded] = Recorded, **options: Any) -> Recorded:
    """A module after a run that starts with random factors."""
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
        # Gradients of a few dozen numbers; float32 sums in another order differ a little more than losses do.
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
