"""Benchmarks of merged models by lm-eval, and their comparison question by question. `docs/use/task_benchmarks.md`.

Read in this order: `settings` (what is asked), `kept_models` (where the model of a run is), `lm_eval_run` (the process
of lm-eval), `samples` (what it has written), `judge` (words for the differences), `benchmark` (all of it together) and
`record` (``tasks.json``, read back).
"""
