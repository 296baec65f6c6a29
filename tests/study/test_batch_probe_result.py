"""The largest harmless batch, the report about it, and its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_lora.errors import DataError
from lightning_lora.study.batch_probe_result import BatchProbeResult
from lightning_lora.study.comparison import Comparison
from lightning_lora.study.probe_plots import draw_probe

WORSE, SAME = (1.0, 0.1, 511.0, "behind"), (0.0, 0.001, 511.0, "matches")


def result(*worse: tuple[int, int], open_pairs: tuple[tuple[int, int], ...] = (), **changes: Any) -> BatchProbeResult:
    pairs = [(8, 16), (8, 32), (16, 32)]
    found: dict[tuple[int, int], Any] = dict.fromkeys(pairs, SAME) | dict.fromkeys(worse, WORSE)
    found |= dict.fromkeys(open_pairs, (0.0, 0.1, 511.0, "cannot tell"))
    comparisons = tuple(Comparison(*pair, *found[pair]) for pair in pairs)
    found_in: dict[str, Any] = {"start_loss": 2.0, "batch_rows": 16, "num_rows": 64, "num_held_out": 512}
    losses = {8: 1.0, 16: 1.0, 32: 1.0}
    return BatchProbeResult(**(found_in | {"losses": losses, "comparisons": comparisons} | changes))


def test_the_largest_harmless_batch_is_below_the_first_that_is_worse() -> None:
    assert (result().largest_harmless, result().bound) == (32, "at least")
    assert (result((16, 32)).largest_harmless, result((16, 32)).bound) == (16, "")
    assert (result((8, 16)).largest_harmless, result((8, 16)).bound) == (8, "at most")
    assert result((8, 32)).largest_harmless == 16
    assert result((8, 32), noise_scale=4.0).calibration == 4.0
    assert result((8, 32)).calibration is None


def test_a_batch_of_which_nobody_can_tell_is_not_called_harmless() -> None:
    open_ = result(open_pairs=((16, 32),), noise_scale=4.0)
    assert (open_.largest_harmless, open_.bound, open_.undecided, open_.calibration) == (16, "at least", 32, 4.0)
    assert str(open_).endswith("at least 16 rows a step; of 32 nobody can tell, more held-out rows would")
    nothing = result((16, 32), open_pairs=((8, 16),), noise_scale=4.0)
    assert (nothing.largest_harmless, nothing.bound, nothing.undecided) == (8, "at least", 16)
    assert nothing.calibration is None
    fallen = Comparison(8, 16, 0.01, 0.005, 511.0, "cannot tell")
    text = str(result(comparisons=(fallen, *result().comparisons[1:])))
    assert "16 against 8: +0.0100 (+0.0018 to +0.0182) nats, cannot tell (3 comparisons)" in text
    worse = result((8, 32), open_pairs=((16, 32),))
    assert (worse.largest_harmless, worse.bound, worse.undecided) == (16, "", None)


def test_the_table_says_what_was_found_and_on_how_little() -> None:
    text = str(result((16, 32), num_held_out=54, step=100))
    assert "batch probe after step 100: 64 rows to each of 3 batches, loss on 54 held-out rows (2.0000 before)" in text
    assert "      16 rows a step,    4 steps: 1.0000  (the run's own)" in text
    assert "  32 against 16: +1.0000 (+0.8352 to +1.1648) nats, worse" in text
    assert "  16 against 8: +0.0000 (-0.0016 to +0.0016) nats, no loss" in text
    assert "54 held-out rows are few: use 256 or more" in text
    assert text.endswith("largest batch that costs nothing (within 0.005 nats): 16 rows a step")
    assert str(result()).endswith("costs nothing (within 0.005 nats): at least 32 rows a step")


def test_a_result_is_read_back_as_it_was_and_drawn(tmp_path: Path) -> None:
    found = result((16, 32), noise_scale=3.5, step=7, seconds=1.5)
    found.save(tmp_path / "batch_probe.json")
    assert BatchProbeResult.load(tmp_path / "batch_probe.json") == found
    assert json.loads((tmp_path / "batch_probe.json").read_text())["calibration"] == 16 / 3.5
    draw_probe(found, tmp_path / "probe.png")
    assert (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found | {"format": "other"},
        lambda found: {name: value for name, value in found.items() if name != "losses"},
        lambda found: found | {"comparisons": found["comparisons"][:1]},
        lambda found: found | {"noise_scale": -1.0},
        lambda found: found | {"losses": 3},
        lambda found: found | {"comparisons": [pair | {"word": "fine"} for pair in found["comparisons"]]},
        lambda found: [found],
    ],
)
def test_a_damaged_result_is_refused(damage: Any, tmp_path: Path) -> None:
    path = tmp_path / "batch_probe.json"
    result().save(path)
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=r"batch_probe\.json is not a complete result of a batch probe"):
        BatchProbeResult.load(path)
    path.write_text("{")
    with pytest.raises(DataError, match="is not a complete result"):
        BatchProbeResult.load(path)
    with pytest.raises(DataError, match=r"none\.json cannot be read: No such file"):
        BatchProbeResult.load(tmp_path / "none.json")
