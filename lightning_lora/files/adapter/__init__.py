"""Adapter folders: PEFT's format and our manifest beside it.

Read in this order: `save_load` (the functions users call), `folder` (a folder as read), `manifest` (our file), `fit`
(checks against a model), `peft_format` (file and tensor names), `peft_config` (settings), `peft_patterns` (PEFT's rules
for names), `peft_checks` (what PEFT's files leave open), `peft_layers`, `peft_experts` and `peft_magnitudes` (layouts
of factors), `peft_trained` (modules trained in full), `resized_tables` (base weights that are stored too),
`stored_layers` (names of older models), `one_scale` (servers with one scale for all layers, and what they refuse) and
`model_card`.
"""
