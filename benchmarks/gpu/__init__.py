"""What one run on a GPU measures, one file a subject; `benchmarks.on_gpu` runs them.

`place`, `models`, `contenders` and `lean` are what the others share.
"""
