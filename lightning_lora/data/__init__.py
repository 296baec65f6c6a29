"""Files and hub datasets to batches of tokens with the trained ones marked.

Read in this order: `sft` (the data module), `sources` (from a name to rows), `reading` and `records` (from a row to a
conversation), `tokenizer`, `template` and `encoding` (to tokens and labels), `tokens` (all of it, cached), `split`
(validation rows), `collate`, `packing` and `bins` (to batches), `terminal_progress`.
"""

from __future__ import annotations

from .sft import SFTDataModule

__all__ = ["SFTDataModule"]
