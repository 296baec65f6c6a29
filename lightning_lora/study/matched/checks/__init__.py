"""What is looked at before a study begins: `equal` (what arms must have in common), `built` (the module of each arm,
built and adapted without memory), `work` (runs, steps and passes over the held-out rows, as a range).
"""
