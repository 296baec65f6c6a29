"""Which rows are trained on, and when.

Read in this order: `hold_out` (conversations kept for validation), `mixture` (sources mixed by shares).
"""
