"""``lightning-lora plan``: what a run takes and whether LoRA is enough, before it begins.

`command` (its options, the page, ``plan.json`` and the YAML).
"""
