"""From rows of tokens to batches.

Read in this order: `collate` (padded or packed), `packing` (which rows share a row), `bins` (the division itself).
"""
