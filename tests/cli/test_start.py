"""What a command imports before it does anything, in fresh processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from safetensors.torch import save_file

from lightning_lora import LoRAConfig, inject_lora, save_adapter
from lightning_lora.cli import LoRACLI, main
from tests.support import toys, warm

# Prints what main() prints, then its exit code and what is loaded of the libraries named after "--".
START = """
import sys
from lightning_lora.cli.main import main

place = sys.argv.index("--")
arguments, libraries = sys.argv[1:place], sys.argv[place + 1:]
try:
    code = main(arguments)
except SystemExit as exit:
    code = exit.code
print("loaded", code, *(name for name in libraries if name in sys.modules))
"""
MODELS = ("lightning", "transformers", "datasets", "torchmetrics", "peft", "bitsandbytes", "torchao")


def start(*arguments: object, libraries: tuple[str, ...]) -> tuple[str, list[str]]:
    """Output of a command, and the exit code with the names of the libraries that it loaded."""
    done = warm.run_cold("-c", START, *arguments, "--", *libraries)
    printed, _, loaded = done.stdout.rpartition("loaded ")
    return printed + done.stderr, loaded.split()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], "0", "usage: lightning-lora"),
        ([], "2", "usage: lightning-lora"),
        (["--version"], "0", "lightning-lora 0."),
        (["mrege"], "2", "error: unknown command 'mrege'; did you mean 'merge'"),
        (["fti"], "2", "error: unknown command 'fti'; did you mean 'fit'"),
        (["merge", "--help"], "0", "example: lightning-lora merge"),
        (["fit", "--help"], "0", "lightning-lora fit --help all"),
        (["recipes"], "0", "strategy/fsdp2.yaml"),
        (["generate", "--help"], "0", "example: lightning-lora generate"),
        (["inspect"], "2", "the following arguments are required: path"),
    ],
)
def test_help_version_and_typing_errors_need_no_torch(arguments: list[str], code: str, words: str) -> None:
    printed, loaded = start(*arguments, libraries=("torch", "numpy", "rich", *MODELS))
    assert words in printed
    assert loaded == [code]


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights of a module and an adapter for them."""
    folder = tmp_path_factory.mktemp("net")
    module = toys.Net()
    (folder / "base").mkdir()
    save_file(module.state_dict(), folder / "base" / "model.safetensors")
    inject_lora(module, LoRAConfig(rank=2))
    with torch.no_grad():
        module.get_parameter("first.lora_B").fill_(0.5)
    save_adapter(module, folder / "adapter")
    return folder


@pytest.mark.slow
def test_inspect_and_merge_need_torch_alone(net: Path, tmp_path: Path) -> None:
    libraries = (*MODELS, "torch.distributed.tensor", "torch._dynamo")  # parts of torch that take a second each
    printed, loaded = start("inspect", net / "adapter", "--verify", libraries=libraries)
    assert "verified: every file" in printed
    assert loaded == ["0"]
    printed, loaded = start("merge", net / "base", net / "adapter", tmp_path / "merged", libraries=libraries)
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert loaded == ["0"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "nowhere"],
        ["merge", "nowhere", "nowhere", "out"],
        ["merge", "nowhere", "nowhere", "out", "--dtype=float8"],
        ["export", "nowhere", "out"],
        ["export", "nowhere", "out", "--format=gguf"],
        ["export", "nowhere", "out", "--for=ollama"],
        ["consolidate", "nowhere", "out"],
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_help_of_fit_loads_no_model_and_no_library_of_quantisation() -> None:
    libraries = ("torchao", "bitsandbytes", "peft", "accelerate", "transformers.modeling_utils")
    printed, loaded = start("fit", "--help", "all", libraries=libraries)
    assert "lightning_lora.tasks.CausalLM" in printed
    assert "lightning_lora.data.SFTDataModule" in printed
    assert loaded == ["0"]


def test_commands_of_the_trainer_are_those_of_the_cli() -> None:
    assert set(main.TRAINER_COMMANDS) == set(LoRACLI.subcommands())


class Parsers(LoRACLI):
    """Goes no further than to the arguments that are known."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        known = {name: "--trainer.max_epochs" in each.format_help() for name, each in self._subcommand_parsers.items()}
        raise SystemExit(" ".join(name for name, is_known in known.items() if is_known))


@pytest.mark.parametrize(
    ("arguments", "known"),
    [(["test", "--trainer.devices=1"], {"test"}), (["--help"], set(LoRACLI.subcommands()))],
)
def test_only_the_command_that_runs_has_its_arguments_prepared(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], known: set[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as found:
        Parsers()
    assert set(str(found.value).split()) == known


@pytest.mark.slow
def test_plan_starts_without_scipy_signal_and_without_a_compiler_and_both_are_there_when_asked_for(
    tmp_path: Path,
) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed")
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    (tmp_path / "rows.jsonl").write_text('{"question": "what", "answer": "that"}\n' * 3)
    arguments = ["plan", str(toys.save_llama(tmp_path / "llama")), str(tmp_path / "rows.jsonl")]
    arguments += ["--json", str(tmp_path / "plan.json")]
    code = f"""
import sys
from lightning_lora.cli.main import main
assert main({arguments!r}) == 0
assert "bitsandbytes" in sys.modules
assert not {{"scipy.signal.windows", "torch._inductor.compile_fx"}} & set(sys.modules)
import gc
assert gc.isenabled()
import scipy.signal.windows
from scipy.signal import get_window
assert list(scipy.signal.hamming(3)) == list(get_window("hamming", 3, fftbins=False))
"""
    warm.run_cold("-c", code)
