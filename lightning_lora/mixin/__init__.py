"""LoRA in a LightningModule.

Read in this order: `lora_mixin` (the class to inherit from), `checked_loading` (of checkpoints, outside of a run),
`run_hooks` (its part in the hooks of a run, which runs once), `no_batches` (a run without a batch is refused),
`row_order` (rows that Lightning shuffles or repeats are told), `given_settings` (that settings given to a module take
effect), `around_root` (what is outside of `lora_root`), `multipliers` (factors on the learning rate), `optim`
(parameter groups), `rates` (learning rates as the start finds them), `rate_search` (Lightning's search for a rate),
`gradient_start` (first values from the gradient on the `first_batches`), `precision` (quantising the base before it is
adapted), `held_base` (frozen weights in the type of mixed precision), `memory_settings` (what a step keeps in memory),
`kept_frozen` (what is frozen stays so), `lightning_callbacks` (callbacks of Lightning that are refused or made exact).
"""
