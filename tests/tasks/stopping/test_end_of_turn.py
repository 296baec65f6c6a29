"""What is trained, merged or exported stops where its answers end, under the chat template it was trained with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lightning_lora import LoRAConfig
from lightning_lora.callbacks import AdapterCheckpoint, MergeOnFitEnd
from lightning_lora.cli import main as cli
from lightning_lora.data import SFTDataModule
from lightning_lora.files.generation_config import add_stops, stops_of
from lightning_lora.tasks import CausalLM
from tests.support import toys
from tests.support.tiny_tokenizer import MARKED, SPECIALS, UNMARKED

pytestmark = [
    *toys.expected_warnings,
    # PEFT asks transformers for a deprecated name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

START, END, OTHER = SPECIALS.index("<|start|>"), SPECIALS.index("<|end|>"), SPECIALS.index("<|system|>")
OTHER_TEMPLATE = MARKED.replace("<|end|>", "<|system|>")
MOST = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that stops at another token than the one that ends its turns, as bases do."""
    return toys.save_llama(tmp_path_factory.mktemp("base") / "llama", eos_token_id=START, bos_token_id=START)


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[CausalLM, Path]:
    """A model that has learned to answer and to end its turn, with its adapter, checkpoint and merged model."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "rows.jsonl").write_text('{"question": "what", "answer": "ok"}\n' * 8)
    module = CausalLM(str(base), 1e-3, lora=LoRAConfig(rank=8, adapt_head=True))
    torch.manual_seed(0)
    callbacks = [AdapterCheckpoint(str(folder / "adapters")), MergeOnFitEnd(str(folder / "merged"))]
    trainer = toys.trainer(folder, callbacks=callbacks, max_epochs=40, enable_checkpointing=False)
    trainer.fit(module, datamodule=SFTDataModule(str(folder / "rows.jsonl"), batch_size=4, max_length=40))
    trainer.save_checkpoint(folder / "run.ckpt", weights_only=True)
    shutil.copytree(folder / "adapters/last", folder / "plain")
    for name in ("generation_config.json", "lightning_lora.json", "README.md"):
        (folder / "plain" / name).unlink()
    return module, folder


def answer(model: Any, tokenizer: Any, **settings: Any) -> list[int]:
    messages = [{"role": "user", "content": "what"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        tokens = model.eval().generate(**prompt, max_new_tokens=MOST, do_sample=False, **settings)
    return tokens[0, prompt["input_ids"].shape[1] :].tolist()


def stops(found: list[int]) -> bool:
    return found[-1] == END and len(found) < MOST and found.count(END) == 1


MERGED = {
    "exported from the checkpoint": ["export", "run.ckpt", "OUT", "--format", "merged"],
    "exported from the adapter": ["export", "adapters/last", "OUT", "--format", "merged"],
    "merged on disk": ["merge", "BASE", "adapters/last", "OUT"],
    "merged on disk from a folder without our files": ["merge", "BASE", "plain", "OUT"],
}


@pytest.mark.parametrize("way", ["written at the end of fit", *MERGED])
def test_a_merged_model_stops_without_being_told(
    way: str, base: Path, run: tuple[CausalLM, Path], tmp_path: Path
) -> None:
    folder, out = run[1], tmp_path / "out"
    if way in MERGED:
        places = {"OUT": out, "BASE": base} | {name: folder / name for name in ("run.ckpt", "adapters/last", "plain")}
        assert cli.main([str(places.get(word, word)) for word in MERGED[way]]) == 0
    else:
        out = folder / "merged"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert stops(answer(model, tokenizer))
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [START, END]
    # The base's own settings stay, and it goes on.
    assert model.generation_config.bos_token_id == START
    assert not stops(answer(model, tokenizer, eos_token_id=START))


def test_the_trained_module_stops_too(run: tuple[CausalLM, Path]) -> None:
    assert stops(answer(run[0].model, run[0].tokenizer))
    loaded = CausalLM.load_from_checkpoint(run[1] / "run.ckpt", weights_only=True)
    assert stops(answer(loaded.model, loaded.tokenizer))


@pytest.mark.parametrize("source", ["run.ckpt", "adapters/last", "plain"])
@pytest.mark.parametrize("server", [None, "vllm", "llama.cpp"])
def test_an_adapter_says_what_its_base_must_be_given(
    source: str,
    server: str | None,
    base: Path,
    run: tuple[CausalLM, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    capsys.readouterr()
    assert cli.main(["export", str(run[1] / source), str(out), *(["--for", server] if server else [])]) == 0
    said = capsys.readouterr().out
    assert f"pass eos_token_id=[{START}, {END}] to generate()" in said
    assert (f"--lora-modules adapter={out} --generation-config {out}" in said) == (server == "vllm")
    assert (f"--override-kv tokenizer.ggml.eot_token_id=int:{END}" in said) == (server == "llama.cpp")
    if server is not None:
        return
    plain: Any = AutoModelForCausalLM.from_pretrained(base)
    adapted, tokenizer = peft.PeftModel.from_pretrained(plain, out), AutoTokenizer.from_pretrained(out)
    assert not stops(answer(adapted, tokenizer))
    assert stops(answer(adapted, tokenizer, eos_token_id=GenerationConfig.from_pretrained(out).eos_token_id))


def test_nothing_is_said_where_the_base_stops_by_itself(
    base: Path, run: tuple[CausalLM, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(run[1] / "adapters/last", adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    shutil.copytree(base, tmp_path / "knowing")
    add_stops(tmp_path / "knowing", [END])
    settings["base_model_name_or_path"] = str(tmp_path / "knowing")
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    (adapter / "lightning_lora.json").unlink()  # it holds hashes
    capsys.readouterr()
    assert cli.main(["export", str(adapter), str(tmp_path / "out"), "--for", "vllm"]) == 0
    said = capsys.readouterr().out
    assert "eos_token_id" not in said
    assert "--generation-config" not in said


@pytest.mark.parametrize("given", ["template", "file", "tokenizer"])
def test_the_template_of_the_run_is_exported_and_decides_where_to_stop(given: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "what", "answer": "ok"}\n' * 4)
    (tmp_path / "other.jinja").write_text(OTHER_TEMPLATE)
    settings: dict[str, Any] = {"chat_template": OTHER_TEMPLATE}
    if given == "file":
        settings = {"chat_template": str(tmp_path / "other.jinja")}
    if given == "tokenizer":
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = OTHER_TEMPLATE
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        settings = {"tokenizer": str(tmp_path / "tokenizer")}
    module = CausalLM(str(base), 1e-3, lora=LoRAConfig(rank=2))
    callbacks = [AdapterCheckpoint(str(tmp_path / "adapters")), MergeOnFitEnd(str(tmp_path / "fitted"))]
    trainer = toys.trainer(tmp_path, callbacks=callbacks)
    trainer.fit(module, datamodule=SFTDataModule(str(tmp_path / "rows.jsonl"), max_length=40, **settings))
    trainer.save_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    for source, form in (
        ("adapters/last", "peft"),
        ("adapters/last", "merged"),
        ("run.ckpt", "peft"),
        ("run.ckpt", "merged"),
    ):
        out = tmp_path / f"{source[:3]}-{form}"
        assert cli.main(["export", str(tmp_path / source), str(out), "--format", form]) == 0
    for name in ("fitted", "adapters/last", "ada-peft", "ada-merged", "run-peft", "run-merged"):
        out = tmp_path / name
        assert AutoTokenizer.from_pretrained(out).chat_template == OTHER_TEMPLATE, name
        assert stops_of(out) == [START, OTHER], name
    # The tokenizer of the model is untouched: another run with it has the template of the model.
    assert module.tokenizer.chat_template == MARKED


def test_named_templates_of_the_base_are_merged_too(base: Path, run: tuple[CausalLM, Path], tmp_path: Path) -> None:
    several, plain = tmp_path / "base", tmp_path / "plain"
    shutil.copytree(base, several)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": MARKED, "tool_use": UNMARKED}
    tokenizer.save_pretrained(several)
    plain.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run[1] / "adapters/last" / name, plain / name)
    assert cli.main(["merge", str(several), str(plain), str(tmp_path / "out")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    assert stops_of(tmp_path / "out") == [START, END]


def test_a_published_config_that_contradicts_itself_is_written_as_it_is(
    base: Path, run: tuple[CausalLM, Path], tmp_path: Path
) -> None:
    """Settings of sampling without ``do_sample``, as many published bases have them."""
    odd = tmp_path / "odd"
    shutil.copytree(base, odd)
    settings = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": START}
    (odd / "generation_config.json").write_text(json.dumps(settings))
    loaded = CausalLM.load_from_checkpoint(run[1] / "run.ckpt", weights_only=True, model=str(odd))
    loaded.save_adapter(tmp_path / "adapter")
    assert loaded.model is not None
    with pytest.warns(UserWarning, match="with the updates of"):
        loaded.model.save_pretrained(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {name: written[name] for name in settings} == settings | {"eos_token_id": [START, END]}
