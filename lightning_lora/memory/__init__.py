"""The memory of a training step, known before it is run: the step is traced with tensors that have no values.

`parts` (what the bytes are for).
"""
