"""Paths of the model and the data inside the package."""

from __future__ import annotations

from pathlib import Path

_ASSETS = Path(__file__).parents[1] / "assets"
MODEL = _ASSETS / "tiny-base"
"""A llama of 1.9 M parameters, with its tokenizer."""
TRAIN = _ASSETS / "gsm8k" / "train.jsonl"
VALIDATION = _ASSETS / "gsm8k" / "validation.jsonl"
