"""Compares runs in pairs, from one snapshot.

Read in this order: `probe` (when and how a run is probed), `batch_probe` (tries other batches), `batch_branches` (a
branch for each batch), `rank_probe` (tries more rank), `rank_branches` (with more rank and without), `branch` (one
short run), `snapshot` (what it starts from), `row_order` (which rows it trains on), `row_losses` (how it is scored),
`comparison` (two branches, row by row), `batch_probe_result`, `rank_probe_result` and `probe_plots`. `statistics` is
what all of them judge by. `matched` runs whole studies: arms, learning rates, seeds. `bank` trains arms side by side on
one base. `report` shows runs and studies on a page. `tasks` has their models benchmarked by lm-eval.
"""
