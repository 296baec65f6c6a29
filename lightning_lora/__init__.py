"""LoRA without regret for any LightningModule."""
