"""Lightning checkpoints: what they hold, how they are written and verified, and exact resume.

Read in this order. Contents: `contents` (adapters only) and `optimizer_state_names` (state keyed by parameter name).
Files: `verified_io` (writing and verifying), `fallback` (the last whole checkpoint instead of a damaged one), `shards`
(folders of shards), `ckpt_path` (what is no checkpoint) and `consolidate` (one file from such a folder). Exact resume: `resume` (what is saved and
restored), and its parts `loop_position` (Lightning's loops), `epoch_start` (the order of the data), `loader_position`
(skipping used indices), `random_state` and `window_gradients` (an open accumulation window).
"""
