"""Files and hub datasets to batches of tokens in which the supervised tokens are marked.

Read in this order: `sft` (the data module), `settings` (how rows become tokens), `sources` (from a name to rows),
`reading`, `records` and `formats` (from a row to a conversation), `bad_rows` (rows that cannot be used), `tokenizer`,
`chat` and `encoding` (to token ids and a mask), `tokens` (all of these steps, cached), `split` (the rows of a split and
their counts), `collate`, `packing` and `bins` (to batches), `terminal_progress`.
"""

from __future__ import annotations

from .sft import SFTDataModule

__all__ = ["SFTDataModule"]
