"""What a batch holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_lora.batch.counting import count_items

IDS, MASK = torch.zeros(2, 5, dtype=torch.long), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"input_ids": IDS, "attention_mask": MASK}, (7, "tokens")),
        ({"input_ids": IDS, "attention_mask": MASK.bool()}, (7, "tokens")),
        ({"input_ids": IDS, "attention_mask": torch.zeros(2, 1, 5, 5)}, (10, "tokens")),
        ({"input_ids": IDS}, (10, "tokens")),
        ({"names": ["x"], "images": torch.zeros(3, 8)}, (3, "rows")),
        (torch.zeros(4, 8), (4, "rows")),
        (["x", (None, torch.zeros(6, 8))], (6, "rows")),
        (torch.tensor(1.0), (1, "rows")),
        ("nothing to count", (0, None)),
    ],
)
def test_what_a_batch_holds(batch: Any, expected: tuple[int, str | None]) -> None:
    count, unit = count_items(batch)
    assert (int(count), unit) == expected
