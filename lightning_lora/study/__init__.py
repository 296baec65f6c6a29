"""Compares runs in pairs, from one snapshot.

Read in this order: `batch_probe` (tries other batches), `batch_branches` (a branch for each batch), `branch` (one short
run), `snapshot` (what it starts from), `row_order` (which rows it trains on), `row_losses` (how it is scored), `paired`
(statistics of differences), `batch_probe_result` and `batch_probe_plot`.
"""
