"""The benchmark of sampling prints a ratio for every way, and times nobody who draws fewer tokens."""

from __future__ import annotations

import pytest

from benchmarks import sampling

TINY = ["--rows=4", "--group-size=2", "--prompt-tokens=4", "--new-tokens=3", "--repetitions=2"]


@pytest.mark.parametrize("rank", [0, 2])
def test_every_way_is_compared_with_a_bare_generate(rank: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert sampling.main([*TINY, f"--rank={rank}"]) == 0
    _, _, *rows = capsys.readouterr().out.strip().splitlines()
    cells = {row.split("|")[1].strip(): row.split("|")[2:4] for row in rows[: len(sampling.WAYS)]}
    assert cells.keys() == sampling.WAYS.keys()
    assert all(float(cell.replace(",", "")) > 0 for pair in cells.values() for cell in pair)
    assert float(cells[sampling.BARE][1]) == 1.0


def test_who_draws_another_number_of_tokens_is_not_timed() -> None:
    with pytest.raises(AssertionError, match="3 tokens were drawn, not 4"):
        sampling.cpu_seconds(lambda: 3, 4)
