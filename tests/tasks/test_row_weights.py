"""A row of weight 2 trains and counts like the same row twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets.config
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig
from lightning_lora.batch.token_loss import one_if_zero
from lightning_lora.callbacks import BatchSizeMonitor
from lightning_lora.data import SFTDataModule
from lightning_lora.data.batches.collate import Collate, CollateEvenly, CollatePacked
from lightning_lora.errors import DataError
from lightning_lora.tasks import CausalLM
from tests.support import tiny_models, toys
from tests.support.packed import Recorded, assert_same_training, examples, ready, save, trained

pytestmark = [
    *toys.expected_warnings,
    *toys.monitor_warnings,
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

WEIGHTS = (2, 1, 3, 1, 1, 2, 1, 1)
Rows = list[dict[str, Any]]


class Logged(Recorded):
    """Remembers what is logged."""

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        self.__dict__.setdefault("logged", []).append((name, float(value)))
        super().log(name, value, *args, **kwargs)


class LoggedWithLogits(Logged):
    """Never computes the loss in the place of the head."""

    _head_is_last = False


def weighted(factor: float = 1.0) -> Rows:
    return [row | {"weight": factor * weight} for row, weight in zip(examples(), WEIGHTS, strict=True)]


def repeated() -> Rows:
    return [row for row, weight in zip(examples(), WEIGHTS, strict=True) for _ in range(weight)]


def padded(rows: Rows) -> Any:
    return DataLoader(rows, -(-len(rows) // 2), collate_fn=Collate(0, "weight" in rows[0]))  # pyright: ignore


def even(rows: Rows) -> Any:
    return DataLoader(rows, -(-len(rows) // 2), collate_fn=CollateEvenly(0, "weight" in rows[0]))  # pyright: ignore


def packed(rows: Rows) -> Any:
    packs = [[rows[:3], rows[3:4]], [rows[4:], []]]
    return ready([CollatePacked(0, "weight" in rows[0])(pack) for pack in packs])


LAYOUTS = {"padded": padded, "even rows": even, "packs": packed}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_models.llama(), tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def twice(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A run in which rows of weight k are there k times."""
    return trained(folder, tmp_path_factory.mktemp("twice"), padded(repeated()), Logged)


@pytest.mark.parametrize("kind", [Logged, LoggedWithLogits])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_is_that_of_repeated_rows(
    folder: Path, twice: Recorded, tmp_path: Path, layout: str, kind: type[Recorded]
) -> None:
    """Two micro-batches in one step."""
    assert_same_training(trained(folder, tmp_path, LAYOUTS[layout](weighted()), kind), twice)


@pytest.mark.parametrize("factor", [0.01, 1000.0])
def test_a_factor_of_all_weights_changes_nothing(folder: Path, twice: Recorded, tmp_path: Path, factor: float) -> None:
    """The weights of the step may add up to less than one token."""
    found = trained(folder, tmp_path, padded(weighted(factor)), Logged)
    found.losses = [loss / factor for loss in found.losses]
    assert_same_training(found, twice)


@pytest.mark.parametrize("kind", [Logged, LoggedWithLogits])
def test_logged_losses_are_those_of_repeated_rows(folder: Path, tmp_path: Path, kind: type[Logged]) -> None:
    found = []
    for rows in (weighted(0.1), repeated()):
        module = kind(str(folder), lora=LoRAConfig(rank=4))
        loader = DataLoader(rows, len(rows), collate_fn=Collate(0, "weight" in rows[0]))  # pyright: ignore
        trainer = toys.trainer(tmp_path, max_epochs=1)
        torch.manual_seed(0)
        trainer.fit(module, loader, loader)
        metrics = trainer.callback_metrics
        found.append([float(metrics[name]) for name in ("train_loss", "val_loss", "val_accuracy", "val_perplexity")])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_validation_keeps_its_digits_in_half_precision(folder: Path, tmp_path: Path) -> None:
    """Lightning then converts the weights too."""
    found = []
    for rows in (weighted(), repeated()):
        loader = DataLoader(rows, 3, collate_fn=Collate(0, "weight" in rows[0]))  # pyright: ignore
        trainer = toys.trainer(tmp_path, precision="bf16-true")
        found.append(trainer.validate(CausalLM(str(folder)), loader, verbose=False)[0]["val_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_monitor_measures_and_changes_nothing(folder: Path, tmp_path: Path, accumulation: int) -> None:
    """With one micro-batch in a step it compares the gradients of rows."""
    monitor = BatchSizeMonitor()
    monitor.warmup_steps = 0
    options: dict[str, Any] = {"accumulate_grad_batches": accumulation, "max_epochs": 3}
    with_it, without = (
        trained(folder, tmp_path, padded(weighted()), **options, callbacks=callbacks) for callbacks in ([monitor], [])
    )
    assert monitor.estimate is not None
    for one, other in zip(with_it.gradients, without.gradients, strict=True):
        assert toys.same(one, other)


def test_without_weights_nothing_is_weighted(folder: Path, tmp_path: Path) -> None:
    """Weights of 1 give the same run to the last bit, so leaving them out changes nothing."""
    ones = [row | {"weight": 1.0} for row in examples()]
    for kind in (Logged, LoggedWithLogits):
        found, expected = (trained(folder, tmp_path, padded(rows), kind) for rows in (ones, examples()))
        assert found.losses == expected.losses
        assert toys.same(found.gradients[0], expected.gradients[0])


def test_weights_of_another_shape_are_refused(folder: Path, tmp_path: Path) -> None:
    batch = Collate(0)(examples()) | {"weights": torch.ones(len(WEIGHTS))}
    with pytest.raises(DataError, match=r"one weight for each token: weights are \(8,\), labels \(8, 12\)"):
        trained(folder, tmp_path, ready([batch]))


def test_only_a_count_of_nothing_becomes_one() -> None:
    assert one_if_zero(torch.tensor(0.25)) == 0.25
    assert one_if_zero(torch.tensor(0)) == 1


TEXTS = [{"question": "what " * (1 + n % 5), "answer": f"{n}", "weight": 1 + n % 3} for n in range(24)]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")

    def write(name: str, rows: Rows) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize("packing", [False, True, "batch"])
def test_weights_come_from_a_file(write: Any, llama_folder: Path, tmp_path: Path, packing: bool | str) -> None:
    """One step over all rows, so that their order does not matter."""
    plain = [{name: row[name] for name in ("question", "answer")} for row in TEXTS]
    once = write("weighted.jsonl", TEXTS)
    often = write("often.jsonl", [row for row, text in zip(plain, TEXTS, strict=True) for _ in range(text["weight"])])
    modules = []
    for path in (once, often):
        data = SFTDataModule(path, batch_size=100, max_length=60, packing=packing)
        torch.manual_seed(0)
        module = Recorded(str(llama_folder), 1e-3, lora=LoRAConfig(rank=2))
        toys.trainer(tmp_path).fit(module, datamodule=data)
        modules.append(module)
    assert_same_training_of_b(*modules)


def assert_same_training_of_b(found: Recorded, expected: Recorded) -> None:
    """As B is zero at the start, A has no gradient yet."""
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    for name, gradient in expected.gradients[0].items():
        assert (found.gradients[0][name] - gradient).norm() <= 3e-5 * gradient.norm(), name


@pytest.mark.parametrize("weight", [1, 1.0, "1", None])
def test_batches_have_weights_only_if_a_row_has_one(write: Any, llama_folder: Path, weight: Any) -> None:
    tokenizer = CausalLM(str(llama_folder)).tokenizer
    rows = [row | {"weight": weight} for row in TEXTS]
    for packing, usual in ((False, "attention_mask"), (True, "position_ids"), ("batch", "position_ids")):
        for rest, weighs in (([], set()), ([TEXTS[1]], {"weights"})):
            path = write("a.jsonl", rows + rest)
            data = SFTDataModule(path, path, tokenizer=tokenizer, packing=packing, max_length=60)
            data.setup()
            for batch in data.train_dataloader():
                assert set(batch) == {"input_ids", "labels", "facts", usual} | weighs
            for batch in data.val_dataloader():
                assert set(batch) == {"input_ids", "labels", "facts", "attention_mask"} | weighs


def test_rows_of_weight_zero_are_dropped_and_counted(write: Any, llama_folder: Path) -> None:
    rows = [row | {"weight": n % 4} for n, row in enumerate(TEXTS)]
    data = SFTDataModule(write("a.jsonl", rows), tokenizer=CausalLM(str(llama_folder)).tokenizer)
    with pytest.warns(UserWarning, match="train: 6 of 24 rows of weight 0 and dropped"):
        data.setup()
    counts = data.statistics["train"]
    assert (counts.rows, counts.weightless_rows, counts.dropped_rows) == (18, 6, 0)
    assert counts.supervised_tokens == sum(sum(mask) for mask in data.rows["train"]["supervised"])


SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import datasets.config, torch
from lightning.pytorch import seed_everything
from lightning_lora import LoRAConfig
from lightning_lora.data import SFTDataModule
from tests.support import toys
from tests.support.packed import Recorded

model, rows, out, ranks = *sys.argv[1:4], int(sys.argv[4])
datasets.config.HF_DATASETS_CACHE = Path(out).parent / "cache"
seed_everything(0, verbose=False)
module = Recorded(model, 1e-3, lora=LoRAConfig(rank=2))
strategy = "ddp" if ranks > 1 else "auto"
trainer = toys.trainer(Path(out).parent, devices=ranks, strategy=strategy, accumulate_grad_batches=2)
trainer.fit(module, datamodule=SFTDataModule(rows, batch_size=12 // ranks, max_length=60))
if trainer.is_global_zero:
    torch.save(module.gradients[0], out)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_divide_by_the_weights_of_both(write: Any, llama_folder: Path, tmp_path: Path) -> None:
    """Weights far below and above 1, so that the ranks have different sums."""
    rows = write("rows.jsonl", [row | {"weight": 0.01 * 3 ** (n % 8)} for n, row in enumerate(TEXTS)])
    for ranks in (1, 2):
        toys.run_python(SCRIPT, llama_folder, rows, tmp_path / f"{ranks}.pt", ranks, ranks=ranks)
    one, two = (torch.load(tmp_path / f"{ranks}.pt") for ranks in (1, 2))
    assert any(gradient.any() for gradient in one.values())
    for name, gradient in one.items():
        assert (two[name] - gradient).norm() <= 3e-5 * gradient.norm(), name
