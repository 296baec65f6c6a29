"""The rows of a step are divided among devices and micro-batches, or a message names the nearest that can be."""

from __future__ import annotations

import pytest

from lightning_lora.batch.division import divide_rows
from lightning_lora.errors import ConfigError


@pytest.mark.parametrize(
    ("rows", "ranks", "micro_batch", "expected"),
    [
        (32, 1, 8, "effective batch 32 = 8 rows x 4 accumulated x 1 device"),
        (32, 2, 8, "effective batch 32 = 8 rows x 2 accumulated x 2 devices"),
        (32, 8, 8, "effective batch 32 = 4 rows x 1 accumulated x 8 devices"),
        (3, 1, 1, "effective batch 3 = 1 row x 3 accumulated x 1 device"),
    ],
)
def test_a_step_is_divided_among_devices(rows: int, ranks: int, micro_batch: int, expected: str) -> None:
    assert str(divide_rows(rows, ranks, micro_batch)) == expected
    assert divide_rows(rows, ranks, micro_batch).rows == rows


@pytest.mark.parametrize(
    ("rows", "ranks", "micro_batch", "message"),
    [
        (33, 2, 8, "cannot be divided among 2 devices: the nearest that can are 32 and 34"),
        (3, 4, 1, "cannot give each of 4 devices a row: use at least 4, or fewer devices"),
        (36, 1, 8, r"not a multiple of 8 rows x 1 device: .* are 32 and 40; or keep it with a batch_size of 9 or 6"),
        (
            36,
            2,
            16,
            r"not a multiple of 16 rows x 2 devices: .* are 32 and 64; or keep it with a batch_size of 18 or",
        ),
    ],
)
def test_a_step_that_cannot_be_divided_names_the_nearest_that_can(
    rows: int, ranks: int, micro_batch: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        divide_rows(rows, ranks, micro_batch)
