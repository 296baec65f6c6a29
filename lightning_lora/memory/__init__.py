"""The memory of a training step, known before it is run: the step is traced with tensors that have no values.

Read in this order: `parts` (what the bytes are for), `live_bytes` (counting storages), `attention_flops`, `step_mode`
(operations without values), `failures` (what cannot be traced), `building` (a module without memory for its weights),
`equal_blocks` and `depths` (a few blocks for many), `step_trace` (a step of it), `strategies` (divided among devices),
`micro_batch` (the largest that fits).
"""
