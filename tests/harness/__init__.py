"""Tests of other projects, from a checkout of theirs, run with this package put in.

`peft_cases` drives PEFT's LoRA tables, `peft_tables` reads them, `peft_models` builds small models for the names they
hold. `lightning_tests` runs Lightning's own tests twice, as they are and with LoRA in their models, and compares:
`outcomes` is the plugin that writes down what each test did, `with_lora` the one that puts LoRA in, and
`lightning_expected.yaml` lists the tests that must differ, with the reasons.
"""
