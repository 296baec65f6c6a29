"""What is timed on this machine.

`shapes` (of the batches of a run, and the operations that each takes), `stopwatch` (the parts of a training step),
`rounds` (as many batches as fit into a time).
"""
