"""LoRA in a LightningModule.

Read in this order: `lora_mixin` (what a user inherits), `outermost_hooks` (when it applies), `optim` (parameter groups
and rates), `precision` (types of adapters and bases).
"""
