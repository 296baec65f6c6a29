"""Settings of `FSDP2Strategy` that need no second process; runs are in `tests/integration/test_strategies.py`."""

from __future__ import annotations

import pytest

from lightning_lora.sharding import FSDP2Strategy


@pytest.mark.parametrize("before", [None, True, False])
def test_gradients_are_communicated_inside_the_context_and_as_before_after_it(before: bool | None) -> None:
    strategy = FSDP2Strategy(defer_gradients=before)
    with strategy.communicating_gradients():
        assert strategy.defer_gradients is False
    assert strategy.defer_gradients is before
    with pytest.raises(RuntimeError, match="in the context"), strategy.communicating_gradients():
        raise RuntimeError("in the context")
    assert strategy.defer_gradients is before
