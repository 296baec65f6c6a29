"""Reads the calibration from a batch probe's file: largest harmless batch over noise scale."""

from __future__ import annotations

import json
import math
from os import PathLike
from pathlib import Path
from typing import Any

from lightning_lora.errors import DataError, ResultFileError

PROBE_FILE = "batch_probe.json"
PROBE_FORMAT = "lightning-lora batch probe 2"


def read_probe(path: str | PathLike[str]) -> dict[str, Any]:
    """Read the result file of a probe as a dictionary.

    Raises:
        DataError: If the file cannot be read, or is not a result of this format.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if found["format"] != PROBE_FORMAT:
            raise ValueError(f"format {found['format']!r}, expected {PROBE_FORMAT!r}")
    except OSError as error:
        raise ResultFileError(f"{path} cannot be read: {error.strerror}. A probe writes {PROBE_FILE}.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged_probe(path, error) from error
    return found


def damaged_probe(path: str | PathLike[str], reason: Exception) -> DataError:
    """The error to raise for a result file with missing or wrong content."""
    return ResultFileError(f"{path} is not a complete result of a batch probe ({reason!r}): run the probe again.")


def known_calibration(path: str | PathLike[str]) -> float:
    """Read the calibration that a probe has written.

    Raises:
        DataError: If the file is damaged, or has no calibration.
    """
    found = read_probe(path)
    try:
        calibration = found["calibration"]
        if calibration is not None and not 0 < float(calibration) < math.inf:
            raise ValueError(f"calibration {calibration!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise damaged_probe(path, error) from error
    if calibration is None:
        raise ResultFileError(
            f"{path} has no calibration, because the noise scale was unknown or no batch could be told from another: "
            f"probe in a run with a BatchSizeMonitor, late enough for its estimate to be conclusive, on more rows."
        )
    return float(calibration)
