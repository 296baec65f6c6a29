"""Lightning checkpoints: what they hold, how they are written and verified, exact resume.

Read in this order: `contents` (adapters only), `optimizer_state_names` (state by parameter name), `resume` (everything
a run needs to go on bit for bit), `loop_position`, `loader_position`, `random_state`, `verified_io` (writing and
reading a file), `fallback` (from a damaged file to the last whole one), `shards` and `consolidate` (folders of shards).
"""
