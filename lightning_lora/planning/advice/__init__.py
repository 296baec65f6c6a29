"""What a plan recommends, and how it is told.

`epoch` (steps as Lightning counts them), `run_tokens` (the tokens of all steps), `settings` (rate, batch, steps),
`rates` (what trains at which multiple of the rate), `objects` (what objects were made with), `traced_methods` (each
method traced), `method` (LoRA, QLoRA or full), `step_rows` (the batches of a step), `run_time` (how long a run takes),
`plan_cost` (the cost of the choice), `verdict` (in words), `page` (how a plan is printed), `named_callbacks` (callbacks
of a Trainer's settings), `config_file` and `fit_config` (the YAML that ``fit`` runs), `plan_parts` (a plan from all of
these, and what its steps keep to be faster).
"""
