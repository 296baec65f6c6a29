"""Tests of other projects, run with this package put in.

`lightning_tests` runs Lightning's own tests twice, as they are and with LoRA in their models, and compares: `outcomes`
is the plugin that writes down what each test did, `with_lora` the one that puts LoRA in, and `lightning_expected.yaml`
lists the tests that must differ, with the reasons.
"""
