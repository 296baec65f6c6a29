"""Sources mixed by shares: exact counts, every row equally often, the same on any number of devices."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import jsonargparse
import numpy
import pytest
import torch
from lightning.pytorch import Trainer
from transformers import PreTrainedTokenizerFast

from lightning_lora.data import SFTDataModule
from lightning_lora.data.sampling.mixture import Mixture, MixtureSampler, read_shares
from lightning_lora.data.split import SourceCounts
from lightning_lora.errors import ConfigError, DataError
from tests.data.conftest import QUIET, Write, examples
from tests.data.test_training import Bigram

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '\\w+' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

SIZES = {"a": 40, "b": 24, "c": 9}


@pytest.fixture
def paths(write: Write) -> dict[str, str]:
    """Files whose rows name the file and have a number; lengths differ."""
    return {
        name: write(f"{name}.jsonl", [{"text": f"{name}{n:03d}" + "x" * (n * 7 % 23)} for n in range(size)])
        for name, size in SIZES.items()
    }


def ready(paths: dict[str, str], shares: dict[str, Any], tokenizer: PreTrainedTokenizerFast, **options: Any) -> Any:
    train = {paths[name]: share for name, share in shares.items()}
    options = {"max_length": 64} | options
    data = SFTDataModule(train, tokenizer=tokenizer, **options)
    data.setup("fit")
    return data


def epoch_of(data: Any, epoch: int) -> list[str]:
    """The rows of an epoch in their order, such as ``"a003"``."""
    loader: Any = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    found = chain.from_iterable(map(examples, loader))
    return [data.tokenizer.decode(ids)[:4] for ids, _ in found]


MIXES = {
    "even": ([40, 24], [0.5, 0.5], 48),
    "exact": ([7000, 3000], [0.7, 0.3], 10000),
    "first runs out": ([10, 1000], [0.9, 0.1], 11),
    "last runs out": ([1000, 10], [0.9, 0.1], 100),
    "three": ([40, 24, 9], [5, 3, 2], 45),
    "thirds": ([100, 100, 100], [1, 1, 1], 300),
    "alone": ([17], [3], 17),
}


@pytest.mark.parametrize(("sizes", "shares", "total"), MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("limit", [None, 10, 33])
def test_counts_are_the_shares_and_every_row_is_seen_equally_often(
    sizes: list[int], shares: list[float], total: int, limit: int | None
) -> None:
    sources = numpy.repeat(numpy.arange(len(sizes)), sizes)
    lengths = numpy.random.default_rng(1).integers(1, 60, len(sources))
    named = read_shares({str(n): share for n, share in enumerate(shares)})
    assert named is not None
    assert sum(named.values()) == 1
    mixture = Mixture(lengths, sources, named, limit, seed=2)
    total = total if limit is None else min(total, limit)
    assert len(mixture) == sum(mixture.counts) == total
    seen: Counter[int] = Counter()
    for epoch in range(7):
        rows = mixture.rows(epoch)
        assert len(set(rows.tolist())) == total, "no row twice in an epoch"
        counts = numpy.bincount(sources[rows], minlength=len(sizes)).tolist()
        assert counts == mixture.counts
        for count, share, size in zip(counts, named.values(), sizes, strict=True):
            assert abs(count - share * total) < 1
            assert count <= size
        assert (lengths[rows] <= mixture.lengths).all()
        seen.update(rows.tolist())
        for source in range(len(sizes)):
            times = [seen[row] for row in numpy.flatnonzero(sources == source).tolist()]
            assert max(times) - min(times) <= 1


def test_shares_are_read_as_written() -> None:
    assert read_shares({"a": 0.7, "b": 0.3}) == {"a": Fraction(7, 10), "b": Fraction(3, 10)}
    assert read_shares({"a": 70, Path("b"): 30.0}) == {"a": Fraction(7, 10), "b": Fraction(3, 10)}
    assert read_shares(["a", "b"]) is read_shares("a") is read_shares(None) is None


def test_an_epoch_has_the_rows_that_the_start_tells(
    paths: dict[str, str], tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        data = ready(paths, {"a": 0.5, "b": 0.3, "c": 0.2}, tokenizer)
    counts: Counter[str] = Counter()
    # c runs out after 9 / 0.2 = 45 rows: 22.5 of a and 13.5 of b.
    for epoch in range(3):
        rows = epoch_of(data, epoch)
        counts = Counter(row[0] for row in rows)
        assert (len(rows), len(set(rows)), counts["c"]) == (45, 45, 9)
        assert {counts["a"], counts["b"]} in ({22, 14}, {23, 13})
    told = data.statistics["train"].sources
    assert told[paths["c"]] == SourceCounts(9, 9)
    assert told[paths["a"]] == SourceCounts(40, counts["a"])
    assert data.statistics["train"].rows == 73
    assert "train: an epoch has 45 rows: " in caplog.text
    assert f"9 from {paths['c']} (20.0%), each of its 9 rows 1.00 times" in caplog.text


def test_seeds_and_epochs_have_orders_of_their_own(paths: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> None:
    shares = {"a": 0.5, "b": 0.5}
    torch.manual_seed(1)
    first = epoch_of(ready(paths, shares, tokenizer, seed=3), 1)
    torch.manual_seed(2)
    numpy.random.seed(5)
    assert epoch_of(ready(paths, shares, tokenizer, seed=3, batch_size=5), 1) == first
    orders = {tuple(epoch_of(ready(paths, shares, tokenizer, seed=s), e)) for s in (0, 1, 2**70) for e in range(3)}
    assert len(orders) == 9
    sources = [row[0] for row in first]
    assert sources != sorted(sources), "the sources take turns"


@pytest.mark.parametrize("num_devices", [2, 3, 8])
def test_devices_share_what_one_device_has(num_devices: int) -> None:
    sources = numpy.repeat([0, 1], [40, 24])
    shares = read_shares({"a": 0.5, "b": 0.5})
    assert shares is not None
    mixture = Mixture(numpy.ones(64, dtype=int), sources, shares, None, seed=1)
    samplers = [MixtureSampler(mixture, 5, num_devices, rank) for rank in range(num_devices)]
    alone = MixtureSampler(mixture, 5, 1, 0)
    for epoch in range(2):
        for sampler in (alone, *samplers):
            sampler.set_epoch(epoch)
        together = [row for turn in zip(*samplers, strict=True) for row in turn]
        assert together[: len(mixture)] == list(alone)
        assert len(together) < len(mixture) + num_devices


@pytest.mark.parametrize("packing", [True, "batch"])
def test_packing_packs_the_rows_of_each_epoch(
    paths: dict[str, str], tokenizer: PreTrainedTokenizerFast, packing: Any, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"packing": packing, "batch_size": 3, "max_length": 40}
    with caplog.at_level("INFO"):
        data = ready(paths, {"a": 1, "b": 2}, tokenizer, **options)
    plain = ready(paths, {"a": 1, "b": 2}, tokenizer, max_length=40)
    assert "train: 36 rows packed into" in caplog.text
    batches = set()
    for epoch in range(4):
        assert sorted(epoch_of(data, epoch)) == sorted(epoch_of(plain, epoch))
        loader: Any = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        shapes = [batch["input_ids"].shape for batch in loader]
        assert all(width <= 40 or packing == "batch" for _, width in shapes)
        batches.add(len(shapes))
    assert len(batches) == 1, "Lightning counts the batches of an epoch once"


def test_a_limit_is_a_limit_of_the_mix(paths: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> None:
    data = ready(paths, {"a": 0.75, "b": 0.25}, tokenizer, max_rows=20)
    assert {row[:4] for row in epoch_of(data, 0)} == {f"a{n:03d}" for n in range(15)} | {f"b{n:03d}" for n in range(5)}


def test_a_glob_is_one_source(paths: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> None:
    name = str(Path(paths["a"]).parent / "[bc].jsonl")
    data = SFTDataModule({name: 3, paths["a"]: 1}, tokenizer=tokenizer)
    data.setup("fit")
    counts = Counter(row[0] for row in epoch_of(data, 0))
    assert (counts["a"], counts["b"], counts["c"]) == (11, 24, 9)
    assert data.statistics["train"].sources == {name: SourceCounts(33, 33), paths["a"]: SourceCounts(40, 11)}


def test_a_list_is_used_whole_and_counted_by_source(paths: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> None:
    data = SFTDataModule([paths["a"], paths["b"], paths["a"]], paths["c"], tokenizer=tokenizer)
    data.setup()
    assert data.statistics["train"].sources == {paths["a"]: SourceCounts(80, 80), paths["b"]: SourceCounts(24, 24)}
    assert data.statistics["validation"].sources == {paths["c"]: SourceCounts(9, 9)}


def test_a_trainer_goes_on_with_other_rows(paths: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> None:
    model = Bigram(tokenizer)
    trainer = Trainer(**QUIET, max_epochs=2)
    trainer.fit(model, datamodule=SFTDataModule({paths["a"]: 0.5, paths["c"]: 0.5}, batch_size=6))
    assert trainer.global_step == 2 * 3
    seen = [tokenizer.decode(ids)[:4] for batch in model.batches for ids, _ in examples(batch)]
    of_a = [row for row in seen if row[0] == "a"]
    assert len(of_a) == len(set(of_a)) == 18
    assert Counter(row for row in seen if row[0] == "c") == {f"c{n:03d}": 2 for n in range(9)}


@pytest.mark.parametrize("given", ["{a.jsonl: 0.7, 'owner/name:train': 3}", '{"a.jsonl": 0.7, "owner/name:train": 3}'])
def test_shares_come_from_yaml_and_the_command_line(write: Write, given: str) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SFTDataModule, "data")
    parser.add_argument("--config", action="config")
    config = write("c.yaml", f"data:\n  train: {given}\n")
    for arguments in (["--config", config], [f"--data.train={given}"]):
        data = parser.instantiate(parser.parse_args(arguments)).data
        assert data.sources["train"] == {"a.jsonl": 0.7, "owner/name:train": 3}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "zero": ({"train": {"a": 0, "b": 1}}, "train: the share of 'a' must be a positive number, got 0"),
    "negative": ({"train": {"a": -1.5}}, "the share of 'a' must be a positive number"),
    "infinite": ({"train": {"a": float("inf")}}, "the share of 'a' must be a positive number"),
    "no number": ({"train": {"a": float("nan")}}, "the share of 'a' must be a positive number"),
    "text": ({"train": {"a": "much"}}, "the share of 'a' must be a positive number, got 'much'"),
    "bool": ({"train": {"a": True}}, "the share of 'a' must be a positive number"),
    "empty": ({"train": {}}, "train is empty; name at least one source"),
    "unparsed": ({"train": "{a.jsonl: much}"}, r"names with numbers as in \{a.jsonl: 0.7, b.jsonl: 0.3\}; got \{a.j"),
    "list of mappings": ({"train": [{"a": 0.7}]}, "a list of train holds names; give names with shares as in"),
    "validation": ({"validation": {"a": 1.0}}, "validation takes names without shares"),
    "test": ({"test": {"a": 1.0}}, "test takes names without shares"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_shares_are_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        SFTDataModule(**options)


def test_a_share_of_no_row_is_refused(paths: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"train: 1.00% of an epoch of 40 rows is no row of '.*b.jsonl'; give it a"):
        ready(paths, {"a": 99, "b": 1}, tokenizer)


def test_a_source_without_usable_rows_is_refused(
    paths: dict[str, str], write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    none = write("none.jsonl", [{"text": "a", "weight": 0}])
    with (
        pytest.warns(UserWarning, match="1 of 10 rows of weight 0 and dropped"),
        pytest.raises(DataError, match=r"no row of '.*none.jsonl' can be trained on"),
    ):
        ready(paths | {"none": none}, {"c": 0.5, "none": 0.5}, tokenizer)
