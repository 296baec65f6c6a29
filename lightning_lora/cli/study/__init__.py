"""``lightning-lora study``: matched runs from a study file, or of one config in full and by adapters.

Read in this order: `command` (the arguments), `default_study` (without a file), `arms` (the config of each arm) with
`fit_config` (what ``fit`` would read) and `matched_size` (as many adapter parameters), `processes` (each run in a
process of its own) and `child` (what is done there), `estimate` (how long it will take), `summary` (what is said before
and after), `devices` (a worker on each GPU), `evaluate` (benchmarks of the models of a study or run).
"""
