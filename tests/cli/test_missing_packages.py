"""A package that is not installed is one line with the command that installs it, and bad input."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_lora.cli import main as cli
from lightning_lora.cli.missing_package import missing_package
from tests.support.commands import EMBEDDED, configs, lightning_lora
from tests.support.toys import expected_warnings

pytestmark = expected_warnings

OWN = """
from lightning.pytorch import Callback
class Built(Callback):
    def __init__(self):
        import nothing_at_all.inside
class Late(Callback):
    def setup(self, *arguments, **options):
        import nothing_at_all
"""
LOGGER = "--trainer.logger=lightning.pytorch.loggers."
NAMED = "error: the package nothing_at_all is not installed: pip install nothing_at_all"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            [f"{LOGGER}WandbLogger"],
            "error: lightning.pytorch.loggers.WandbLogger: Requirement 'wandb>=0.12.10' not",
        ),
        (["--trainer.logger=MLFlowLogger"], "running `pip install -U 'mlflow>=1.0.0'`"),
        (["--trainer.logger=TensorBoardLogger"], "`tensorboard` nor `tensorboardX` is available. Try `pip install`"),
        (["--trainer.strategy=deepspeed"], "`pip install -U deepspeed`"),
        (
            [
                "--trainer.plugins=lightning.pytorch.plugins.TransformerEnginePrecision",
                "--trainer.plugins.init_args.weights_dtype=torch.float32",
            ],
            "pip install -U 'transformer_engine",
        ),
        (["--trainer.callbacks=own.Built"], NAMED.replace("error: ", "error: own.Built: ")),
        (["--trainer.callbacks=lacking.Any"], NAMED.replace("error: ", "error: lacking.Any: ")),
        (["--trainer.callbacks=own.Late"], NAMED),
    ],
)
def test_what_a_config_names_without_its_package(arguments: list[str], expected: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "lacking.py").write_text("import nothing_at_all\nclass Any: pass\n")
    model = [*configs("sft.yaml"), *EMBEDDED]
    done = lightning_lora("--allow", "own", "--allow", "lacking", "fit", *model, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert expected in line
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("adapters"))


def test_a_package_of_our_extras_is_named_by_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking(*arguments: object) -> None:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        raise ModuleNotFoundError("No module named 'bitsandbytes.nn'", name="bitsandbytes.nn")

    monkeypatch.setattr(cli, "run_command", lacking)
    assert cli.main(["merge"]) == 2
    assert 'the package bitsandbytes is not installed: pip install "lightning-lora[quant]"' in capsys.readouterr().err


def test_a_fault_of_our_own_is_no_missing_package() -> None:
    assert missing_package(ModuleNotFoundError("No module named 'lightning_lora.gone'")) is None
    assert missing_package(ValueError("rank must be at least 1")) is None
