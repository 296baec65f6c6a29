"""Merging adapters into base weights, on disk by blocks of rows and in memory.

Read in this order: `merge_files` (the command), `plan` (which tensors change), `tied_tensors` (those that are shared),
`stored_names` (their names in a checkpoint), `stored_experts` (how a checkpoint splits experts), `row_blocks` (the
update by blocks), `rounding` (sums and their errors), `base_check` (whether the base is the right one),
`beside_weights` (config and tokenizer), `merged_model` (from memory to a folder).
"""
