"""``lightning-lora plan``: what a run takes and whether LoRA is enough, before it begins.

`quick_imports` (large libraries in less time), `command` (its options, the page, ``plan.json`` and the YAML).
"""
