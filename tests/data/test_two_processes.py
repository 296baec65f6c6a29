"""Two processes read together the rows and packs that one process reads."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lightning_lora.data import SFTDataModule
from tests.data.conftest import QUIET, examples
from tests.support import toys
from tests.support.tiny_tokenizer import tiny_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The '\\w+' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
]

ROWS = [{"question": f"{n:03d}" + "x" * (n * 7 % 23), "answer": "0" * (1 + n % 5)} for n in range(42)]
"""An even number of rows, as one of the two devices would repeat a padded row otherwise."""
PACKINGS = (False, True)


class Reader(LightningModule):
    """Remembers the ids of the examples in each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1, bias=False)
        self.tokenizer = tiny_tokenizer()
        self.seen: list[list[list[int]]] = []

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        self.seen.append([ids for ids, _ in examples(batch)])
        return self.layer.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Validated(Reader):
    """Reads validation rows too, and does not remember them."""

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        """Do nothing."""


def read(path: str, packing: bool, devices: int, shares: bool = False) -> tuple[list[Any], int]:
    """The examples of each batch that this process gets in two epochs, and its rank.

    With ``shares``, two thirds of the rows come from the file itself, the rest from a copy with other answers, and some
    are held out.
    """
    reader = Validated() if shares else Reader()
    trainer = Trainer(**QUIET, strategy="ddp" if devices > 1 else "auto", devices=devices, max_epochs=2)
    more: dict[str, Any] = {"train": path}
    if shares:
        more = {"train": {path: 2, path.replace("a.jsonl", "b.jsonl"): 1}, "validation_share": 0.27}
    data = SFTDataModule(batch_size=2 // devices, max_length=64, seed=5, packing=packing, **more)
    trainer.fit(reader, datamodule=data)
    return reader.seen, reader.global_rank


SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
import datasets.config, torch
from tests.data.test_two_processes import PACKINGS, read
datasets.config.HF_DATASETS_CACHE = sys.argv[2]
for shares in (False, True):
    for packing in PACKINGS:
        seen, rank = read(sys.argv[1], packing, devices=2, shares=shares)
        torch.save(seen, f"{sys.argv[2]}/{packing}{rank}{shares}")
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path.with_name("b.jsonl").write_text("".join(json.dumps(row | {"answer": "no"}) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture(scope="module")
def folder(path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each of two processes has read, with each packing."""
    folder = tmp_path_factory.mktemp("processes")
    toys.run_python(SCRIPT, path, folder, ranks=2)
    return folder


@pytest.mark.parametrize("packing", PACKINGS, ids=["padded", "packed"])
def test_two_processes_read_together_what_one_reads(
    path: str, folder: Path, packing: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    one, other = (torch.load(folder / f"{packing}{rank}False") for rank in range(2))
    together = [batch + more for batch, more in zip(one, other, strict=True)]
    assert together == read(path, packing, devices=1)[0]
    data = SFTDataModule(path, tokenizer=tokenizer)
    data.setup("fit")
    assert sorted(chain(*together)) == sorted(list(data.rows["train"]["input_ids"]) * 2)


@pytest.mark.parametrize("packing", PACKINGS, ids=["padded", "packed"])
def test_two_processes_mix_and_hold_out_what_one_does(path: str, folder: Path, packing: bool) -> None:
    one, other = (torch.load(folder / f"{packing}{rank}True") for rank in range(2))
    alone, _ = read(path, packing, devices=1, shares=True)
    together = [batch + more for batch, more in zip(one, other, strict=True)]
    for found, expected in zip(together, alone, strict=True):
        # Rows are repeated to fill the last batch of an epoch.
        assert found[: len(expected)] == expected
