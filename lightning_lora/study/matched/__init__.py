"""Matched studies: arms that differ in one thing only, each at its own best learning rate, with several seeds.

Read in this order: `record` (what a study folder holds, and `read_study`), `spec` (the settings), `cells` (one run),
`planner` (which runs are wanted now) with `judge` (the verdicts), `store` (which run belongs to which worker) on
`database`, `outcomes` (results as text), `worker` (does the runs) with `progress` (a line for each), `folder` (what is
written).
"""
