"""Callbacks for the memory of a training step.

`memory_choice` (what a step keeps to be faster, before it runs), `memory_advice` (which settings to lower).
"""
