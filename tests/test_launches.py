"""How many operators a step takes above the frozen model's, which is what a GPU waits for in small models."""

from __future__ import annotations

import pytest

from benchmarks.launches import LINEARS, launches

# What is counted today; the limits that were set are 5 in bf16-true and 6 in bf16-mixed.
ABOVE_THE_FLOOR = {"32-true": 4.95, "bf16-true": 4.83, "bf16-mixed": 4.0, "bf16-mixed, base in bfloat16": 4.83}


@pytest.mark.parametrize("precision", ABOVE_THE_FLOOR)
def test_an_adapted_layer_takes_few_operators_above_the_frozen_one(precision: str) -> None:
    above = launches("ours", precision) - launches("floor", precision)
    total = launches("ours", precision).total() - launches("floor", precision).total()
    assert total / LINEARS <= ABOVE_THE_FLOOR[precision], above


def test_under_autocast_no_frozen_weight_of_its_type_is_cast_and_an_input_once_for_its_layers() -> None:
    casts = {name: launches(name, "bf16-mixed")["_to_copy"] for name in ("floor", "ours")}
    assert casts["ours"] < casts["floor"]
    assert launches("ours", "bf16-true").total() == launches("ours", "bf16-mixed, base in bfloat16").total()
