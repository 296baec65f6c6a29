"""LoRA in a LightningModule.

Read in this order: `lora_mixin` (the class to inherit from), `outermost_hooks` (how it runs its part of a hook once),
`given_settings` (that settings given to a module take effect), `optim` (parameter groups and learning rates),
`rate_search` (Lightning's search for a rate), `precision` (quantising the base before it is adapted).
"""
