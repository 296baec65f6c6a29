"""Whether adapters have room for what they learn: measurements during training, and the verdict."""
