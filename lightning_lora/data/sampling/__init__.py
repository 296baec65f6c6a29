"""Which rows are trained on, and when; which are held out.

Read in this order: `hold_out` (conversations kept for validation), `each_once` (their rows on several devices),
`mixture` (sources mixed by shares).
"""
