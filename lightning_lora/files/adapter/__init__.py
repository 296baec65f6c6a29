"""Adapter folders: PEFT's format and our manifest beside it.

Read in this order: `save_load` (the functions users call), `folder` (the files), `fit` (an adapter against a model),
`peft_format` (names and config), `peft_patterns` (PEFT's rules for names), `peft_layers` and `peft_experts` (layouts),
`vllm_rules`, `model_card`.
"""
