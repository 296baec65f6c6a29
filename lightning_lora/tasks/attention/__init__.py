"""How a task's model computes attention.

`implementation` (which of transformers', also for packed rows), `packing_check` (whether a model keeps packed examples
apart), `mask` (what transformers need not ask the device).
"""
