"""Exports for servers that know one alpha, read by their formula, by PEFT and, where it is installed, by llama.cpp."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, inject_lora, merge_lora, save_adapter
from lightning_lora.cli import main as cli
from tests.support.moe_models import moe
from tests.support.tiny_models import wake

pytestmark = [
    # PEFT asks transformers for a deprecated name, and looks for fused experts among modules only.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match any targeted:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match any targeted:RuntimeWarning"),
]

TOKENS = torch.tensor([[5, 9, 17, 3, 44, 60, 2, 31, 7, 12]])
VARIED: dict[str, Any] = {
    "rank": 8,
    "alpha": 16.0,
    "rank_pattern": {"*.layers.0.mlp.*": 4, "o_proj": 2},
    "alpha_pattern": {"q_proj": 40.0, "*.layers.1.mlp.down_proj": 3.0},
}
SETTINGS = {
    "one scale": {"rank": 8, "alpha": 16.0},
    "ranks": {"rank": 8, "alpha": 16.0, "rank_pattern": {"o_proj": 2}},
    "rslora": {"rank": 8, "alpha": 16.0, "scaling": "rslora"},
    "kept start": {"rank": 4, "alpha": 16.0, "init": "pissa"},
    "patterns": VARIED,
    "patterns and rslora": VARIED | {"scaling": "rslora"},
    "head and table": VARIED | {"adapt_head": True, "adapt_embeddings": True},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama whose head is its own."""
    return _saved(tmp_path_factory.mktemp("base"), tie_word_embeddings=False)


def _saved(folder: Path, **settings: Any) -> Path:
    shape: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**shape, **settings)).save_pretrained(folder)
    return folder


def adapted(base: Path, **settings: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    inject_lora(model, LoRAConfig.from_dict(settings))
    wake(model, size=0.05)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def served(base: Path, folder: Path, server: str) -> Tensor:
    """Logits of the base with the updates of ``folder`` added by the one formula that ``server`` has."""
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    model = AutoModelForCausalLM.from_pretrained(base)
    alpha, r = config["lora_alpha"], config["r"]
    for name, B in tensors.items():
        if "lora_B" not in name and "lora_embedding_B" not in name:
            continue
        A = tensors[name.replace("lora_B", "lora_A").replace("lora_embedding_B", "lora_embedding_A")]
        scale = alpha / B.shape[1] if server == "llama.cpp" else alpha / (math.sqrt(r) if config["use_rslora"] else r)
        module = name.removeprefix("base_model.model.").replace(".lora_B.weight", "").replace(".lora_embedding_B", "")
        delta = scale * B @ A
        weight = model.get_submodule(module).weight
        weight.data += delta if "embedding" not in name else delta.T
    return logits(model)


@pytest.mark.parametrize("server", ["llama.cpp", "vllm"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_server_with_one_scale_computes_what_was_trained(name: str, server: str, base: Path, tmp_path: Path) -> None:
    model = adapted(base, **SETTINGS[name])
    expected, folder = logits(model), save_adapter(model, tmp_path / "adapter")
    out = tmp_path / "out"
    assert cli.main(["export", str(folder), str(out), "--for", server]) == 0
    torch.testing.assert_close(served(base, out, server), expected, rtol=1e-5, atol=1e-5)
    plain: Any = AutoModelForCausalLM.from_pretrained(base)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(plain, out)), expected, rtol=1e-5, atol=1e-5)
    right = ("one scale", "kept start", "ranks" if server == "llama.cpp" else "rslora")
    needed = name not in right
    # Whoever reads the folder as it was gets another function, and a folder that is right is left as it is.
    as_it_was = served(base, folder, server)
    assert ((as_it_was - expected).abs().max() > 1e-3) == needed
    assert (out / "lightning_lora.json").exists() != needed


def test_experts_get_the_one_scale_of_vllm_too(tmp_path: Path) -> None:
    model = moe("mixtral")
    inject_lora(model, LoRAConfig(rank=8, alpha=16.0))
    wake(model, size=0.1)
    expected = logits(model)
    folder = save_adapter(model, tmp_path / "adapter")
    assert cli.main(["export", str(folder), str(tmp_path / "out"), "--for", "vllm"]) == 0
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "experts" in name and "lora_B" in name}
    # Experts have half the rank of attention, and so twice the scale.
    assert all(torch.equal(2 * before[name], after[name]) for name in changed)
    reloaded = peft.PeftModel.from_pretrained(moe("mixtral"), tmp_path / "out")  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(logits(reloaded), expected, rtol=1e-4, atol=1e-4)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "norms": ({}, {"trainable": ["*.norm"]}, r"reads past trained norms without a word \(model.norm.weight\)"),
    "a head trained in full": ({}, {"trainable": ["lm_head"]}, r"stops at modules trained in full .*lm_head.weight"),
    "a tied table": ({"tie_word_embeddings": True}, {"adapt_embeddings": True, "tied_weights": "untie"}, "tied in the"),
    "both tied": (
        {"tie_word_embeddings": True},
        {"adapt_embeddings": True, "tied_weights": "both"},
        "tied in the base",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_drops_is_refused_by_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_base, settings, words = REFUSED[name]
    model = adapted(_saved(tmp_path / "base", **{"tie_word_embeddings": False} | of_base), rank=4, **settings)
    save_adapter(model, tmp_path / "adapter")
    assert cli.main(["export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--for", "llama.cpp"]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "error: llama.cpp cannot serve this as an adapter" in printed
    assert re.search(words, printed), printed
    assert "Merge first: `lightning-lora export RUN OUT --format merged`" in printed
    assert not (tmp_path / "out").exists()


def test_experts_are_refused_for_llama_cpp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = moe("mixtral")
    inject_lora(model, LoRAConfig(rank=4))
    wake(model)
    save_adapter(model, tmp_path / "adapter")
    assert cli.main(["export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--for", "llama.cpp"]) == 2
    assert "knows no adapters of fused experts (model.layers.0.mlp.experts" in capsys.readouterr().err


LLAMA_CPP = Path(os.environ.get("LLAMA_CPP", "llama.cpp"))
without_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None or not (LLAMA_CPP / "convert_lora_to_gguf.py").is_file(),
    reason="needs the package llama-cpp-python, and in LLAMA_CPP the folder of llama.cpp's converters",
)
# A tiny model has no tokenizer; everything else of the converter is as it comes.
CONVERT = """
import runpy, sys
script, *arguments = sys.argv[1:]
sys.path.insert(0, str(__import__("pathlib").Path(script).parent))
from conversion.base import TextModel
import conversion.llama
conversion.llama.LlamaModel.set_vocab = TextModel._set_vocab_none
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""


@without_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_llama_cpp_computes_what_was_trained(name: str, base: Path, tmp_path: Path) -> None:
    model = adapted(base, **SETTINGS[name])
    expected = logits(model)[0].log_softmax(-1)
    save_adapter(model, tmp_path / "adapter")
    assert cli.main(["export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--for", "llama.cpp"]) == 0
    merge_lora(model)
    model.save_pretrained(tmp_path / "merged")
    plain = _gguf("convert_hf_to_gguf.py", base, tmp_path / "base.gguf")
    merged = _gguf("convert_hf_to_gguf.py", _without_factors(tmp_path / "merged", base), tmp_path / "merged.gguf")
    lora = _gguf("convert_lora_to_gguf.py", tmp_path / "out", tmp_path / "lora.gguf", "--base", str(base))
    assert (_log_probabilities(plain, lora) - expected).abs().max() <= 2e-3
    assert (_log_probabilities(merged) - expected).abs().max() <= 2e-3
    assert (_log_probabilities(plain) - expected).abs().max() > 0.05


def _without_factors(folder: Path, base: Path) -> Path:
    from safetensors.torch import save_file

    file = folder / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "lora_" not in name}, file, {"format": "pt"})
    return folder


def _gguf(script: str, source: Path, out: Path, *options: str) -> Path:
    command = [sys.executable, "-c", CONVERT, str(LLAMA_CPP / script), str(source), "--outfile", str(out)]
    done = subprocess.run([*command, "--outtype", "f32", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def _log_probabilities(model: Path, lora: Path | None = None) -> Tensor:
    import llama_cpp  # pyright: ignore[reportMissingImports]

    found = llama_cpp.Llama(
        str(model), lora_path=None if lora is None else str(lora), logits_all=True, n_ctx=64, n_threads=1, verbose=False
    )
    found.eval(TOKENS[0].tolist())
    return torch.tensor(found.scores[: TOKENS.shape[1]]).log_softmax(-1)
