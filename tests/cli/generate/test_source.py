"""What can be named to ``generate``: runs, checkpoints, adapters, whole models; and what cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from lightning_lora import LoRAConfig, inject_lora, load_adapter, save_adapter
from lightning_lora.checkpoints.shards import META
from lightning_lora.cli import main as cli
from lightning_lora.cli.embedded import MODEL
from lightning_lora.cli.generate.answers import generate
from lightning_lora.cli.generate.decoding import Sampling
from lightning_lora.cli.generate.loading import choose_loading, load
from lightning_lora.cli.generate.source import find
from lightning_lora.data.records import Conversation
from lightning_lora.errors import AdapterFileError, ConfigError
from lightning_lora.files.atomic import sha256
from lightning_lora.files.json_object import read_json
from tests.cli.generate.runs import SHORT, generated
from tests.support import toys
from tests.support.tiny_models import llama_classifier, wake

pytestmark = toys.expected_warnings

PROMPTS = [Conversation("", [{"role": "user", "content": text}]) for text in ("What is 2 + 3?", "Hi")]


def texts(model: Any, tokenizer: Any) -> list[str]:
    return [answer.text for answer in generate(model, tokenizer, PROMPTS, None, Sampling(8))]


def plain() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def base_texts(base: Any, tokenizer: Any) -> list[str]:
    return texts(base, tokenizer)


def columns(lines: list[dict[str, Any]], name: str) -> list[str]:
    return [line[name] for line in lines]


@pytest.mark.parametrize("what", ["", "checkpoints", "adapters/last"])
def test_run_checkpoint_and_adapter_answer_alike_and_so_does_the_base_in_them(
    what: str, run_folder: Path, tmp_path: Path, tokenizer: Any, base_texts: list[str]
) -> None:
    source = next((run_folder / what).glob("*.ckpt")) if what == "checkpoints" else run_folder / what
    lines = generated(source, tmp_path / "out.jsonl", "--compare")
    expected = plain()
    load_adapter(expected, run_folder / "adapters/last")
    assert columns(lines, "answer") == texts(expected, tokenizer) != base_texts
    assert columns(lines, "base_answer") == base_texts


@pytest.mark.slow
def test_a_run_of_full_fine_tuning_is_compared_with_its_base(
    full_run: Path, tmp_path: Path, tokenizer: Any, base_texts: list[str]
) -> None:
    lines = generated(full_run, tmp_path / "out.jsonl", "--compare")
    (file,) = (full_run / "checkpoints").glob("*.ckpt")
    state = torch.load(file, weights_only=True)["state_dict"]
    expected = plain()
    expected.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    assert columns(lines, "answer") == texts(expected, tokenizer) != base_texts
    assert columns(lines, "base_answer") == base_texts


def test_a_merged_model_answers_as_its_adapter_and_has_nothing_to_compare(
    run_folder: Path, tmp_path: Path, base_texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    merged, out = tmp_path / "merged", tmp_path / "out.jsonl"
    assert cli.main(["export", str(run_folder), str(merged), "--format=merged"]) == 0
    lines = generated(merged, out)
    assert columns(lines, "answer") == columns(generated(run_folder, tmp_path / "other.jsonl"), "answer")
    out.unlink()
    capsys.readouterr()
    assert cli.main(["generate", str(merged), "--prompt=Hi", "--compare", f"--out={out}"]) == 2
    assert "is a whole model, and there is nothing to compare it with" in capsys.readouterr().err
    assert not out.exists()
    lines = generated(merged, out, "--compare", f"--base={MODEL}")
    assert columns(lines, "base_answer") == base_texts


@pytest.mark.filterwarnings("ignore:.*whether it was trained on these base weights cannot be checked:UserWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_that_peft_has_saved_answers_as_in_peft(
    tmp_path: Path, tokenizer: Any, base_texts: list[str]
) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    model: Any = peft.get_peft_model(plain(), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    ids = tokenizer.apply_chat_template(PROMPTS[0].messages, add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    written = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=[0, 4], pad_token_id=1)
    expected = tokenizer.decode(written[0, ids.shape[1] :]).removesuffix("<|end|>")
    lines = generated(tmp_path / "adapter", tmp_path / "out.jsonl")
    assert lines[0]["answer"] == expected != base_texts[0]


def test_the_best_of_a_run_is_its_best_adapter_or_what_its_checkpoints_say(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="does not know its best model"):
        find(run_folder, "best")
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    (file,) = (run / "checkpoints").glob("*.ckpt")
    checkpoint = torch.load(file, weights_only=True)
    state = {"monitor": "val_loss", "best_model_path": "elsewhere/checkpoints/best.ckpt"}
    checkpoint |= {"callbacks": {"ModelCheckpoint{}": state}, "global_step": checkpoint["global_step"] + 1}
    torch.save(checkpoint, run / "checkpoints" / "last.ckpt")
    shutil.rmtree(run / "adapters")
    file.rename(run / "checkpoints" / "best.ckpt")
    Path(f"{file}.manifest.json").unlink()
    assert find(run, "best").path == run / "checkpoints" / "best.ckpt"
    shutil.copytree(run_folder / "adapters" / "last", run / "adapters" / "best")
    assert find(run, "best").path == run / "adapters" / "best"


def test_a_real_best_checkpoint_is_found(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(monitor="val_loss", save_last=True)
    toys.trainer(tmp_path, callbacks=[keeper], enable_checkpointing=True).fit(toys.Toy(), toys.loader(), toys.loader(2))
    assert str(find(tmp_path, "best").path) == keeper.best_model_path


def _checkpoint(folder: Path, **content: Any) -> Path:
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6", "global_step": 1, **content}, folder / "x.ckpt")
    return folder / "x.ckpt"


def _adapter(folder: Path, model: Any, **settings: Any) -> Path:
    inject_lora(model, LoRAConfig(rank=2, **settings))
    wake(model)
    return save_adapter(model, folder / "adapter")


def _shards(folder: Path) -> Path:
    (folder / "run" / "checkpoints" / "last.ckpt").mkdir(parents=True)
    (folder / "run" / "checkpoints" / "last.ckpt" / META).touch()
    return folder / "run"


def _classifier(folder: Path) -> Path:
    model = llama_classifier()
    model.save_pretrained(folder / "classifier")
    return folder / "classifier"


WRONG: dict[str, tuple[Any, str]] = {
    "nothing there": (lambda folder: folder / "nowhere", "nowhere does not exist: give a run folder, a checkpoint"),
    "an empty folder": (lambda folder: folder, "holds no checkpoint, adapter or model: give a run folder"),
    "another module": (lambda folder: _checkpoint(folder, hyper_parameters={"width": 3}), "by a module of yours"),
    "another class": (
        lambda folder: _checkpoint(folder, lightning_lora={"module": "mine.Net"}), "x.ckpt was written by mine.Net, and"
    ),
    "a classifier's run": (
        lambda folder: _checkpoint(folder, hyper_parameters={"_class_path": "lightning_lora.tasks.SequenceClassifier"}),
        "written by lightning_lora.tasks.SequenceClassifier, and text is generated with CausalLM, DPO, PolicyGradient",
    ),
    "a classifier's adapter": (
        lambda folder: _adapter(folder, llama_classifier(), trainable=["score"]), "of another task (SEQ_CLS)"
    ),
    "a classifier": (_classifier, "is a LlamaForSequenceClassification: it writes no text"),
    "an adapter of no model": (lambda folder: _adapter(folder, toys.Net()), "not say on which base it was trained"),
    "shards": (_shards, "make one file of it with `lightning-lora consolidate"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_generate_is_refused_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = WRONG[name]
    assert cli.main(["generate", str(make(tmp_path)), "--prompt=Hi", "--device=cpu", f"--out={tmp_path / 'out'}"]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.count("error: ") == 1
    assert printed.err.splitlines()[-1].startswith("error: ")
    assert printed.out == ""
    assert not (tmp_path / "out").exists()


def test_a_foreign_checkpoint_points_to_the_adapter_beside_it(run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder / "adapters", tmp_path / "adapters")
    (tmp_path / "checkpoints").mkdir()
    file = _checkpoint(tmp_path / "checkpoints", lightning_lora={"module": "mine.Net"})
    source, how = find(file), choose_loading("cpu", None, None, False)
    with pytest.raises(AdapterFileError, match=r"Its adapter folder works where there is one: .*adapters/last"):
        load(source, how)


def test_another_base_is_refused_unless_it_is_meant(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = plain()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODEL / name, tmp_path / "other")
    arguments = ["generate", str(adapter), "--prompt=Hi", *SHORT, f"--base={tmp_path / 'other'}"]
    assert cli.main(arguments) == 2
    assert "--allow-other-base takes this one" in capsys.readouterr().err
    assert cli.main([*arguments, "--allow-other-base"]) == 0


@pytest.mark.parametrize("kind", ["adapter", "checkpoint"])
def test_a_base_that_is_gone_is_named(
    kind: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "adapter":
        shutil.copytree(run_folder / "adapters" / "last", tmp_path / "adapter")
        source = tmp_path / "adapter"
        config = read_json(source / "adapter_config.json") | {"base_model_name_or_path": "./gone"}
        (source / "adapter_config.json").write_text(json.dumps(config))
        manifest = read_json(source / "lightning_lora.json")
        manifest["files"]["adapter_config.json"] = {
            "bytes": (source / "adapter_config.json").stat().st_size,
            "sha256": sha256(source / "adapter_config.json"),
        }
        (source / "lightning_lora.json").write_text(json.dumps(manifest))
    else:
        (file,) = (run_folder / "checkpoints").glob("*.ckpt")
        checkpoint = torch.load(file, weights_only=True)
        checkpoint["hyper_parameters"]["model"] = "./gone"
        torch.save(checkpoint, source := tmp_path / "x.ckpt")
    arguments = ["generate", str(source), "--prompt=Hi", *SHORT]
    assert cli.main(arguments) == 2
    printed = capsys.readouterr().err
    assert "'./gone' is not a folder on this machine" in printed
    assert "--base" in printed
    assert cli.main([*arguments, f"--base={MODEL}"]) == 0


def test_which_is_for_run_folders_only(adapter: Path, run_folder: Path) -> None:
    with pytest.raises(ConfigError, match="is no run folder"):
        find(adapter, "best")
    with pytest.raises(ConfigError, match="--which must be one of last, best, got 'bset'; did you mean 'best'"):
        find(run_folder, "bset")
    assert find(run_folder, "last") == find(run_folder)
