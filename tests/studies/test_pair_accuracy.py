"""The accuracy of a study of preferences, from the losses of its pairs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from lightning_lora.study.statistics.arm import Arm
from studies.modules.pages import write_lines
from studies.modules.pair_accuracy import ACCURACY, accuracy_lines, accuracy_table


def losses(margins: list[float]) -> np.ndarray:
    return -np.log(1 / (1 + np.exp(-np.array(margins))))


def test_a_pair_is_right_where_the_chosen_answer_has_the_higher_reward(tmp_path: Path) -> None:
    seeds = {0: losses([0.1, 2.0, -0.1, 0.3]), 1: losses([0.2, -3.0, -0.1, 0.1])}
    arms = {"one": Arm("one", seeds, {}, math.log(2)), "failed": Arm("failed", {}, {0: "NaN"}, math.log(2))}
    (line,) = accuracy_lines(arms)
    assert (line["arm"], line["pairs"], line["each"], line["mean"]) == ("one", 4, "0.750 0.500", "0.6250")
    assert float(line["low"]) < 0.625 < float(line["high"])
    write_lines(tmp_path / ACCURACY, [line])
    assert f"0.6250 ({line['low']} to {line['high']})" in accuracy_table(tmp_path)


def test_the_interval_is_that_of_a_share_where_there_is_one_seed() -> None:
    right = [1.0] * 30 + [-1.0] * 10
    (line,) = accuracy_lines({"one": Arm("one", {0: losses(right)}, {}, 1.0)})
    error = math.sqrt(0.75 * 0.25 / 39)
    assert float(line["low"]) == pytest.approx(0.75 - 2.0227 * error, abs=1e-3)
