"""Data modules: from files or hub datasets to batches of tokens with the trained ones marked."""

from __future__ import annotations

from .sft import SFTDataModule

__all__ = ["SFTDataModule"]
