"""Merging adapters into base weights, on disk by blocks of rows and in memory.

Read in this order: `merge_files` (the command), `plan` (which tensors change), `stored_names` (what a checkpoint calls
them), `stored_experts` (how experts are cut), `row_blocks` (the update by blocks), `base_check` (is it the right base),
`certificate` (what rounding took), `merged_model` (in memory, to a folder).
"""
