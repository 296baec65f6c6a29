"""LoRA settings in hyperparameters are saved and logged as plain types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_lora import LoRAConfig, LoRAMixin
from tests.support import toys
from tests.support.toys import Net, Plain, fit

pytestmark = toys.expected_warnings

CONFIG = LoRAConfig(rank=2)


class Saved(LoRAMixin, Plain):
    def __init__(self, lora: Any = None) -> None:
        super().__init__(lora=lora)
        self.save_hyperparameters()
        self.net = Net()


def test_hyperparameters_with_a_config_object_reload_with_weights_only(tmp_path: Path) -> None:
    module = Saved(LoRAConfig(rank=2, targets=["first"]))
    fit(module, tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    assert isinstance(module.hparams["lora"], LoRAConfig)
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]["lora"]["targets"] == ["first"]
    loaded = Saved.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert toys.same(toys.snapshot(module), toys.snapshot(loaded))


def test_hyperparameters_are_logged_as_plain_types(tmp_path: Path) -> None:
    import yaml
    from lightning.pytorch.loggers import CSVLogger

    fit(Saved(CONFIG), tmp_path, logger=CSVLogger(tmp_path, name="", version=""))
    assert yaml.safe_load((tmp_path / "hparams.yaml").read_text())["lora"]["rank"] == 2


def test_a_base_class_that_saves_hyperparameters_does_not_save_arguments_that_were_not_given(tmp_path: Path) -> None:
    class Existing(toys.Plain):
        def __init__(self, width: int = 8) -> None:
            super().__init__()
            self.save_hyperparameters()

    class Mine(LoRAMixin, Existing):
        lora = LoRAConfig(rank=2)

    module = Mine(width=4)
    toys.fit(module, tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"] == {"width": 4}
    assert dict(module.hparams_initial) == {"width": 4}
    loaded = Mine.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert toys.same(toys.snapshot(loaded), toys.snapshot(module))
