"""Results of runs as text, for the database and for ``result.json`` in a run folder."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_lora.files.safetensors_file import write_tensors
from lightning_lora.study.matched.cells import Outcome
from lightning_lora.study.matched.record import RowLosses

_TYPES = {"loss_sum": "<f8", "tokens": "<i8", "selection": "|u1"}


def outcome_to_text(outcome: Outcome) -> str:
    """An outcome as JSON; losses of rows are kept bit by bit."""
    plain = {name: value for name, value in vars(outcome).items() if name != "rows"}
    rows = vars(outcome.rows)
    packed = {
        name: base64.b64encode(rows[name].numpy().astype(kind).tobytes()).decode() for name, kind in _TYPES.items()
    }
    return json.dumps(plain | {"rows": packed})


def outcome_from_text(text: str) -> Outcome:
    """The outcome of `outcome_to_text`."""
    plain = json.loads(text)
    rows = {
        name: torch.from_numpy(np.frombuffer(base64.b64decode(plain["rows"][name]), kind).copy())
        for name, kind in _TYPES.items()
    }
    evaluations = tuple((int(step), int(tokens), float(loss)) for step, tokens, loss in plain.get("evaluations", ()))
    return Outcome(**(plain | {"rows": as_losses(**rows), "evaluations": evaluations}))


def write_row_losses(path: Path, rows: RowLosses) -> None:
    """Write ``row_losses.safetensors``."""
    tensors: dict[str, Tensor] = {name: getattr(rows, name) for name in _TYPES}
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(path, tensors.items(), layout, {"unit": "nats"})


def as_losses(loss_sum: Tensor, tokens: Tensor, selection: Tensor) -> RowLosses:
    """Losses of rows in the types that files have."""
    return RowLosses(loss_sum.double(), tokens.to(torch.int64), selection.to(torch.bool))
