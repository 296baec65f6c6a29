"""Scripts that run the test tables of other projects, from a checkout of theirs, against this package.

`peft_cases` drives PEFT's LoRA tables, `peft_tables` reads them, `peft_models` builds small models for the names they
hold.
"""
