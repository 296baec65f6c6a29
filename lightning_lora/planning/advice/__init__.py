"""What a plan recommends, and how it is told.

`epoch` (steps as Lightning counts them), `settings` (rate, batch, steps), `largest_batches` (the batch that needs the
most memory), `traced_methods` (each method traced), `method` (LoRA, QLoRA or full), `plan_cost` (the cost of the
choice), `verdict` (in words), `page` (how a plan is printed), `config_file` and `fit_config` (the YAML that ``fit``
runs).
"""
