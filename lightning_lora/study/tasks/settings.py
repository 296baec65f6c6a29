"""What is asked of a benchmark, alike for all models."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_lora.errors import BenchmarkError

KEEP_VARIABLE = "LIGHTNING_LORA_KEEP_MODELS"
"""Environment variable that tells the processes of the runs of a study to keep whole models."""
BAND = 0.01
"""Share of the questions that counts as no difference: one point."""


@dataclass(frozen=True)
class TaskSettings:
    """Settings of lm-eval, the same for all models that are compared.

    Args:
        tasks: Names of tasks or groups, as ``lm-eval ls tasks`` lists them.
        limit: Only so many questions of each task; below 1 it is a share of them. None: all.
        num_fewshot: Worked examples before each question. None: as the task says.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``. None: a GPU if there is one.
        chat_template: Whether questions are put as the user's turn of a chat.
        task_folder: A folder with YAML files of further tasks.
        allow_code_execution: Whether programs that the models write may be run.
        band: Share of the questions that counts as no difference.

    Raises:
        ConfigError: If a setting is wrong.
    """

    tasks: tuple[str, ...]
    limit: float | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    device: str | None = None
    chat_template: bool = False
    task_folder: str | None = None
    allow_code_execution: bool = False
    band: float = BAND

    def __post_init__(self) -> None:
        if not self.tasks or not all(self.tasks):
            raise BenchmarkError("there are no tasks: give --tasks gsm8k, or several with commas between.")
        if self.limit is not None and not (0 < self.limit < math.inf and (self.limit < 1 or self.limit % 1 == 0)):
            raise BenchmarkError(f"--limit must be a number of questions, or a share below 1, got {self.limit:g}.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise BenchmarkError(f"--fewshot must not be negative, got {self.num_fewshot}.")
        if self.batch_size < 1:
            raise BenchmarkError(f"--batch-size must be at least 1, got {self.batch_size}.")
        if not 0 < self.band < 1:
            raise BenchmarkError(f"--band must be a share of the questions between 0 and 1, got {self.band:g}.")
        if self.task_folder is not None and not Path(self.task_folder).is_dir():
            raise BenchmarkError(f"--task-folder {self.task_folder} is no folder.")

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values."""
        return asdict(self) | {"tasks": list(self.tasks)}
