"""The bits of the base model, against closed forms and against losses computed by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_lora import ConfigError, LoRAConfig
from lightning_lora.data import SFTDataModule
from lightning_lora.planning.base_bits import measure_base_bits
from lightning_lora.planning.count_data import count_data
from lightning_lora.tasks import CausalLM, SequenceClassifier
from tests.data.conftest import Write
from tests.support import toys
from tests.support.moe_models import moe
from tests.support.tiny_models import llama, wake
from tests.support.tiny_tokenizer import tiny_tokenizer

pytestmark = toys.expected_warnings
VOCAB = 400


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random base, one that finds all tokens equally likely, and one that is sure of the wrong ones."""
    found = {}
    for name in ("random", "uniform", "wrong", "mixture"):
        model = moe("qwen3_moe", vocab_size=VOCAB) if name == "mixture" else llama(vocab_size=VOCAB)
        if name != "random":
            torch.nn.init.constant_(model.lm_head.weight, 0.0)
        if name == "wrong":
            torch.nn.init.normal_(model.lm_head.weight, std=20)
        found[name] = tmp_path_factory.mktemp("bases") / name
        model.save_pretrained(found[name])
        tiny_tokenizer().save_pretrained(found[name])
    return found


@pytest.fixture
def rows(write: Write) -> str:
    """Rows of different lengths; some are there twice."""
    texts = [{"question": f"what is {i % 30}?", "answer": "the answer is " + "five " * (i % 30 % 7)} for i in range(40)]
    return write("rows.jsonl", texts)


def by_hand(folder: Path, data: SFTDataModule) -> float:
    """Bits of all different rows."""
    module = CausalLM(str(folder), lora=None)
    module.configure_model()
    assert module.model is not None
    data.prepare_data()
    data.setup("fit")
    table = data.rows["train"].to_dict()
    assert isinstance(table, dict)
    different = set(zip(map(tuple, table["input_ids"]), map(tuple, table["supervised"]), strict=True))
    nats = 0.0
    for ids, supervised in different:
        with torch.no_grad():
            logits = module.eval()(torch.tensor([ids]))[0, :-1].double()
        losses = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        nats += float(losses[torch.tensor(supervised[1:])].sum())
    return nats / math.log(2)


@pytest.mark.parametrize("name", ["uniform", "mixture"])
def test_a_uniform_base_needs_the_logarithm_of_its_vocabulary_for_each_token(
    folders: dict[str, Path], rows: str, name: str
) -> None:
    module, data = CausalLM(str(folders[name])), SFTDataModule(rows)
    counts = count_data(data, module)
    assert counts.duplicate_rows == 10
    for sample in (8, 2048):
        found = measure_base_bits(module, data, rows=sample)
        exact = (counts.unique_supervised_tokens or 0) * math.log2(VOCAB)
        assert found.bits == pytest.approx(exact, rel=1e-6)
        assert found.low == pytest.approx(exact, rel=1e-6) == found.high
        assert found.rows == min(sample, 30)


def test_all_rows_give_the_sum_of_their_losses_without_an_interval(folders: dict[str, Path], rows: str) -> None:
    module = CausalLM(str(folders["random"]), lora=LoRAConfig(rank=2))
    found = measure_base_bits(module, SFTDataModule(rows, packing=True))
    assert found.bits == pytest.approx(
        by_hand(folders["random"], SFTDataModule(rows, tokenizer=tiny_tokenizer())), rel=1e-5
    )
    assert found.low == found.bits == found.high
    assert found.tokens == count_data(SFTDataModule(rows), module).unique_supervised_tokens


def test_the_interval_of_a_sample_covers_the_whole(folders: dict[str, Path], rows: str) -> None:
    module, data = CausalLM(str(folders["random"])), SFTDataModule(rows)
    whole = measure_base_bits(module, data).bits
    samples = [measure_base_bits(module, data, rows=10, seed=seed) for seed in range(8)]
    assert len({sample.bits for sample in samples}) > 4
    assert all(sample.low < sample.bits < sample.high for sample in samples)
    # 95 %, a little less for ten rows.
    assert sum(sample.low <= whole <= sample.high for sample in samples) >= 6
    assert samples[3] == measure_base_bits(module, data, rows=10, seed=3)
    few = measure_base_bits(module, data, tokens=60)
    assert 2 <= few.rows < 10


def test_module_data_and_random_state_stay_as_they_are(folders: dict[str, Path], rows: str) -> None:
    module, data = CausalLM(str(folders["random"]), lora=LoRAConfig(rank=2)), SFTDataModule(rows)
    state = torch.get_rng_state()
    measure_base_bits(module, data, rows=4)
    assert module.model is None
    assert module.lora == LoRAConfig(rank=2)
    assert not data.rows
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:rank 2 is more")
def test_adapters_of_a_built_module_are_off(folders: dict[str, Path], rows: str) -> None:
    module, data = CausalLM(str(folders["random"]), lora=LoRAConfig(rank=2)), SFTDataModule(rows)
    base = measure_base_bits(module, data, rows=6)
    module.configure_model()
    wake(module, size=1.0)
    before = toys.snapshot(module)
    again = measure_base_bits(module, data, rows=6)
    assert again.bits == pytest.approx(base.bits, rel=1e-6)
    assert toys.same(toys.snapshot(module), before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_quantised_base_is_measured_as_it_is_trained(folders: dict[str, Path], rows: str) -> None:
    module = CausalLM(str(folders["random"]), lora=LoRAConfig(), quantization="int8")
    plain = measure_base_bits(CausalLM(str(folders["random"])), SFTDataModule(rows))
    found = measure_base_bits(module, SFTDataModule(rows))
    assert found.bits == pytest.approx(plain.bits, rel=0.02)
    assert found.bits != plain.bits


def test_a_base_that_is_worse_than_chance_is_told(folders: dict[str, Path], rows: str) -> None:
    with pytest.warns(UserWarning, match=r"bits for a trained token, more than the 8\.64 of a uniform guess"):
        measure_base_bits(CausalLM(str(folders["wrong"])), SFTDataModule(rows), rows=4)


class Classes(LightningModule):
    """A classifier that predicts the loss of each row."""

    def __init__(self, predicts: bool = True) -> None:
        super().__init__()
        self.scores = torch.nn.Linear(4, 3)
        torch.nn.init.zeros_(self.scores.weight)
        self.predicts = predicts

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        x, y = batch
        scores = self.scores(x) * 0
        return {"loss": F.cross_entropy(scores, y, reduction="none")} if self.predicts else scores


def data_module(x: Tensor, y: Tensor) -> Any:
    return LightningDataModule.from_datasets(TensorDataset(x, y), batch_size=4)


def test_a_classifier_is_measured_by_its_own_losses() -> None:
    data = data_module(torch.arange(80.0).view(20, 4), torch.arange(20) % 3)
    found = measure_base_bits(Classes(), data)
    assert found.bits == pytest.approx(20 * math.log2(3))
    assert (found.rows, found.tokens) == (20, 20)


@pytest.mark.parametrize(
    ("module", "data", "problem"),
    [
        (toys.Plain, lambda: data_module(torch.randn(4, 4), torch.zeros(4).long()), "must return a mapping with the"),
        (
            lambda: Classes(False),
            lambda: data_module(torch.randn(4, 4), torch.zeros(4).long()),
            "must return a mapping",
        ),
        (Classes, lambda: data_module(torch.randn(4, 4), torch.randn(4)), "regression"),
    ],
    ids=["no predict_step", "no losses", "regression"],
)
def test_what_gives_no_losses_in_nats_is_refused(module: Any, data: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        measure_base_bits(module(), data())


def test_a_new_head_a_stream_and_wrong_numbers_are_refused(folders: dict[str, Path], rows: str) -> None:
    with pytest.raises(ConfigError, match="the head of SequenceClassifier is new"):
        measure_base_bits(SequenceClassifier(str(folders["random"]), num_labels=2), SFTDataModule(rows))
    module = CausalLM(str(folders["random"]))
    with pytest.raises(ConfigError, match="streaming: false"):
        measure_base_bits(module, SFTDataModule(rows, streaming=True, max_rows=4))
    wrong: list[dict[str, Any]] = [{"rows": 1}, {"rows": 2.0}, {"tokens": 0}]
    for settings in wrong:
        with pytest.raises(ConfigError, match="must be a whole number"):
            measure_base_bits(module, SFTDataModule(rows), **settings)
