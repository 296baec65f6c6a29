"""Pairs of answers of which one is preferred.

Read in this order: `data_module` (files or hub datasets to batches of pairs), `encode_pairs` (a pair to two rows of
tokens), `collate` (rows of pairs to a batch).
"""
