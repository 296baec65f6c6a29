"""Lightning checkpoints: what they hold, how they are written and verified, and exact resume.

Read in this order. Contents: `contents` (adapters only), `grown_ranks` (those of `RankGrowth`), `optimizer_state_names`
(state keyed by parameter name) and `wrapped_names` (a compiled module's). Files: `verified_io` (writing and verifying),
`fallback` (the last whole checkpoint instead of a damaged one), `shards` (folders of shards), `consolidate` (one file
from such a folder) and `ckpt_path` (what is no checkpoint). Exact resume: `resume` (what is saved and restored), and
its parts `loop_position` (Lightning's loops), `epoch_start` (the order of the data), `loader_position` (skipping used
indices), `random_state` and `window_gradients` (an open accumulation window).
"""
