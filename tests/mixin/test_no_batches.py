"""A run without a batch, which Lightning ends as if it had trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig
from lightning_lora.callbacks import LoRA, MergeOnFitEnd
from lightning_lora.errors import ConfigError
from tests.support import toys
from tests.support.toys import Plain, Toy, trainer

pytestmark = [*toys.expected_warnings, pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero")]
FEW: Any = toys.rows(3)
EMPTY: dict[str, tuple[Callable[[], Any], str]] = {
    "no rows": (lambda: DataLoader([], 2), "no rows for this process"),  # type: ignore[arg-type]
    "fewer rows than a batch": (lambda: DataLoader(FEW, 4, drop_last=True), "3 rows, and batch_size=4"),
}


@pytest.mark.parametrize("case", EMPTY)
@pytest.mark.parametrize("how", ["mixin", "callback", "in full"])
def test_a_run_without_a_batch_is_refused(how: str, case: str, tmp_path: Path) -> None:
    """B72."""
    loader, message = EMPTY[case]
    module = Plain() if how == "callback" else Toy(lora=LoRAConfig(rank=2) if how == "mixin" else None)
    callbacks = [] if how == "in full" else [MergeOnFitEnd(str(tmp_path / "merged"))]
    run = trainer(tmp_path, callbacks=[*([LoRA({"rank": 2})] if how == "callback" else []), *callbacks])
    with pytest.raises(ConfigError, match=message):
        run.fit(module, loader())
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("options", [{"limit_train_batches": 0}, {"max_epochs": 0}])
def test_a_run_that_is_asked_for_no_batch_is_none(options: dict[str, Any], tmp_path: Path) -> None:
    trainer(tmp_path, **options).fit(Toy(), toys.loader())
