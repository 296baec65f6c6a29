"""Runs compared in pairs, from one snapshot.

Read in this order: `batch_probe` (tries other batches), `batch_arms` and `branch` (what is run), `snapshot` (from
what), `row_order` (on which rows), `row_losses` (how it is scored), `batch_probe_result` and `batch_probe_plot`.
"""
