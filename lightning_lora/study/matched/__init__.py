"""Matched studies: arms that differ in one thing only, each at its own best learning rate, with several seeds.

Read in this order: `study` (from Python; ``lightning-lora study`` is in the room `cli`), `record` (what a study folder
holds, and `read_study`), `spec` (what is compared) with `settings` (each one read), `options` (configs of arms) and
the room `checks` (before a study begins), `cells` (one run), `planner` (which runs are wanted now) with `judge` (the
verdicts) and the room `judging` (what else is found), `open_study`, `store` (which run belongs to which worker) on
`database`, `outcomes` (results as text), `worker` (does the runs) with `progress` (a line for each), `folder` (what is
written); `run_cell` (trains and scores) with `recorder` (order of data, costs, curve), the room `measures` (curve,
evaluations, energy) and `held_out` (losses of rows).
"""
