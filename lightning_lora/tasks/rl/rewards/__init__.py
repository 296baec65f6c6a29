"""What scores completions, in processes of their own with a time limit.

- `worker`: the process that scores.
- `process`: it, seen from the process that trains.
- `pool`: batches of rows to several of them.
"""
