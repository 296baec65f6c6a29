"""The calibration that a batch probe has measured: largest harmless batch over noise scale."""

from __future__ import annotations

import json
import math
from os import PathLike
from pathlib import Path
from typing import Any

from lightning_lora.errors import DataError

PROBE_FILE = "batch_probe.json"
PROBE_FORMAT = "lightning-lora batch probe 1"


def read_probe(path: str | PathLike[str]) -> dict[str, Any]:
    """The content of a probe's result file.

    Raises:
        DataError: If there is no such file, or it is not a result of this format.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if found["format"] != PROBE_FORMAT:
            raise ValueError(f"format {found['format']!r}, expected {PROBE_FORMAT!r}")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. A probe writes {PROBE_FILE}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise damaged_probe(path, error) from error
    return found


def damaged_probe(path: str | PathLike[str], reason: Exception) -> DataError:
    """The error for a result file whose content makes no sense."""
    return DataError(f"{path} is not a whole result of a batch probe ({reason!r}): probe again.")


def known_calibration(path: str | PathLike[str]) -> float:
    """The calibration that a probe has written.

    Raises:
        DataError: If the file is not a whole result, or comes from a probe that did not know the noise scale.
    """
    try:
        calibration = read_probe(path)["calibration"]
        if calibration is not None and not 0 < float(calibration) < math.inf:
            raise ValueError(f"calibration {calibration!r}")
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise damaged_probe(path, error) from error
    if calibration is None:
        raise DataError(
            f"the probe of {path} knew no noise scale to compare its batch with: probe in a run with a "
            f"BatchSizeMonitor, late enough for its estimate to be conclusive."
        )
    return float(calibration)
