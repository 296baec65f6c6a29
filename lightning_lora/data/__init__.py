"""Files and hub datasets to batches of tokens in which the supervised tokens are marked.

Read in this order: `sft` (the data module), `rows_module` (what it shares with others), `settings` (how rows become
tokens), `sources` (from a name to rows), `reading` and `records` (from a row to a conversation), `bad_rows` (rows that
cannot be used), `tokenizer`, `template` and `encoding` (to token ids and a mask), `documents` (texts of many rows),
`tokens` (all of these steps, cached), `split` (the rows of a split and their counts), `sampling` (held-out rows,
sources mixed by shares), `collate`, `packing` and `bins` (to batches), `terminal_progress`.
"""

from __future__ import annotations

from .sft import SFTDataModule

__all__ = ["SFTDataModule"]
