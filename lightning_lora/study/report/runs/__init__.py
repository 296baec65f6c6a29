"""The report of one run.

Read in this order: `run_record` (what its folder holds) with `losses`, then `run_page` and its parts: `run_summary`,
`run_curves`, `batch_panel`, `capacity_panel`, `run_health` (with the plan) and `run_origin`.
"""
