"""Files and hub datasets to batches of tokens in which the supervised tokens are marked.

Read in this order: `sft` (the data module), `rows_module` and `splits_module` (what it shares with others),
`settings` (how rows become tokens), `sources` (from a name to rows), `reading`, `records` and `formats` (from a row
to a conversation), `bad_rows` (rows that cannot be used), `tokenizer`, `chat` and `encoding` (to token ids and a
mask), `documents` (texts of many rows), `token_table` (a batch of rows, all of these steps), `processes` (several
batches at once), `tokens` (a whole source, cached), `source_report` (what is told about it), `read_splits` (the
sources of a split), `split` (its counts), `sampling` (held-out rows, sources mixed by shares), `streaming` (rows that
are tokenised while training), `batches` (padded or packed), `preferences` (pairs of answers), `prompts` (what a model
is asked, without answers), `terminal_progress`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_lora.data.preferences.data_module import PreferenceDataModule
    from lightning_lora.data.prompts.data_module import PromptDataModule
    from lightning_lora.data.sft import SFTDataModule

__all__ = ["PreferenceDataModule", "PromptDataModule", "SFTDataModule"]
_FILES = {
    "PreferenceDataModule": ".preferences.data_module",
    "PromptDataModule": ".prompts.data_module",
    "SFTDataModule": ".sft",
}


def __getattr__(name: str) -> object:
    # Imported when first asked for: processes that tokenise start without torch and Lightning, four times as fast.
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(_FILES[name], __name__), name)
    return globals()[name]
