"""The memory of a training step, known before it is run: the step is traced with tensors that have no values.

Read in this order: `parts` (what the bytes are for), `live_bytes` (counting storages), `counted` (what an operation
counts), `step_mode` (operations without values), `failures` (what cannot be traced), `building` (a module without
memory for its weights), `equal_blocks` and `depths` (a few blocks for many), `step_trace` (a step of it), `strategies`
(divided among devices), `micro_batch` (the largest that fits), `candidates` (the fastest way to train that fits). Of a
run that has begun: `room` (what its device has for a step), `run_step` (its step beside that), `other_settings` (the
same step with less), `process_peak` (the peak that it reached).
"""
