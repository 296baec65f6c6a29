"""LoRA in a LightningModule.

Read in this order: `lora_mixin` (the class to inherit from), `outermost_hooks` (how it runs its part of a hook once),
`optim` (parameter groups and learning rates), `precision` (quantising the base before it is adapted).
"""
