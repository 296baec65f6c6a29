"""Callbacks that guard the processes and files of a run, not its training.

`graceful_stop` with `spared_workers` (signals), `rank_watch` (lost processes), `run_lock` (two runs in one folder),
`steady_loggers` (loggers that fail).
"""
