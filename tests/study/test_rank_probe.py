"""A rank probe confirms that an adapter of half the needed rank gains by growing, and no other does (V19)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig, RankProbe
from lightning_lora.errors import ConfigError, DataError, LoRAError
from lightning_lora.files.events import read_events
from lightning_lora.study.rank_branches import grown_module, raised_ranks
from lightning_lora.study.rank_probe_result import RankProbeResult
from tests.capacity.teacher import RankedStudent, rows
from tests.study.student import Student, loader, snapshot
from tests.support import toys

pytestmark = toys.expected_warnings


def probed(folder: Path, rank: int, seed: int) -> RankProbeResult:
    module = RankedStudent(rank, 0, seed, learning_rate=6e-4)
    trainer = toys.trainer(folder)
    trainer.fit(module, DataLoader(rows("flat", 4096, 1000 + seed), 32))
    return RankProbe(min_epoch=0).run(
        module,
        DataLoader(rows("flat", 2048, 3000 + seed), 32),
        DataLoader(rows("flat", 512, 7000 + seed), 32),
        optimizer_state=trainer.optimizers[0].state_dict(),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "confirmed"), [(4, True), (16, False)])
def test_more_rank_is_confirmed_where_the_teacher_has_more(rank: int, confirmed: bool, tmp_path: Path) -> None:
    assert [probed(tmp_path, rank, seed).confirmed for seed in range(3)] == [confirmed] * 3


def test_growth_changes_no_output_and_no_scale(tmp_path: Path) -> None:
    module = RankedStudent(4, 0)
    toys.trainer(tmp_path).fit(module, DataLoader(rows("flat", 256, 1), 32))
    grown: Any = grown_module(module, raised_ranks(module, 2), 0)
    x = torch.randn(16, 48)
    assert grown.layer.lora_spec.rank == 8
    assert grown.layer.lora_spec.scale == module.layer.lora_spec.scale  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.allclose(grown.layer(x), module.layer(x), rtol=0, atol=1e-6)


def test_a_probe_outside_of_a_run_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    module, state = snapshot(tmp_path)
    before, random = toys.snapshot(module), torch.get_rng_state()
    result = RankProbe(min_steps=2, min_epoch=0).run(module, loader(64, 0), loader(64, 5), optimizer_state=state)
    assert toys.same(toys.snapshot(module), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert (result.rank, result.grown_rank, result.num_rows, result.num_held_out) == (16, 32, 64, 64)


def test_a_run_is_the_same_with_a_probe_and_keeps_the_result(tmp_path: Path) -> None:
    def trained(*callbacks: Callback) -> RankedStudent:
        torch.manual_seed(0)
        module = RankedStudent(4, 0)
        toys.trainer(tmp_path, callbacks=list(callbacks)).fit(module, loader(320, 0), loader(32, 5))
        return module

    probe = RankProbe(at=4, min_steps=3, min_epoch=0)
    assert toys.same(*map(toys.snapshot, (trained(), trained(probe))))
    assert probe.result is not None
    assert probe.result.step == 4
    assert RankProbeResult.load(tmp_path / "rank_probe.json") == probe.result
    assert (tmp_path / "rank_probe.png").stat().st_size > 1000
    (event,) = (event for event in read_events(tmp_path) if event["event"] == "rank_probe")
    assert event["verdict"] == probe.result.verdict
    assert f"  {probe.result.verdict}: " in str(probe.result)


@pytest.mark.parametrize(
    ("gain", "error", "verdict"),
    [
        (0.0051, 0.001, "CONFIRMED"),
        (0.003, 0.001, "NOT CONFIRMED"),
        (0.0, 0.001, "NOT CONFIRMED"),
        (-0.1, 0.01, "NOT CONFIRMED"),
        (0.0, 0.01, "CANNOT TELL"),
        (0.1, 0.07, "CANNOT TELL"),
    ],
)
def test_a_gain_is_confirmed_beyond_its_interval_and_refused_within_the_band(
    gain: float, error: float, verdict: str
) -> None:
    """A noisy branch is no proof that more rank is of no use."""
    result = RankProbeResult(4, 8, 32, 2048, 512, 1, 3.0, 2.0 + gain, 2.0, error, 511)
    assert result.verdict == verdict
    assert result.confirmed is (verdict == "CONFIRMED")
    assert f"  {verdict}: " in str(result)


@pytest.mark.parametrize("text", ["", "[]", '{"format": "other"}', '{"format": "lightning-lora rank probe 1"}'])
def test_a_damaged_result_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(DataError, match="not a complete result of a rank probe"):
        RankProbeResult.load(tmp_path / "result.json")
    with pytest.raises(DataError, match="cannot be read"):
        RankProbeResult.load(tmp_path / "none.json")


class Bare(Student):
    lora = None


class Full(Student):
    lora = LoRAConfig(rank=48, targets=["layer"])


class Blind(Student):
    predict_step = LightningModule.predict_step


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (Bare(), {}, "Bare has no adapters"),
        (Full(), {}, "has its full rank already"),
        (Blind(), {}, "must return a mapping"),
        (Student(), {"min_steps": 9}, "needs 288 training rows, and there are 256: lower min_steps to 8"),
    ],
)
def test_what_cannot_be_probed_is_refused(module: Student, settings: dict[str, Any], message: str) -> None:
    chosen: dict[str, Any] = {"min_steps": 1, "min_epoch": 0} | settings
    probe = RankProbe(**chosen)
    with pytest.raises(LoRAError, match=message):
        probe.run(module, loader(256, 0), loader(8, 5))


@pytest.mark.parametrize("settings", [{"factor": 1}, {"at": 0}, {"min_steps": 0}, {"held_out_rows": 1}])
def test_settings_outside_their_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        RankProbe(**settings)
