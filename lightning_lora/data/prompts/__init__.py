"""Prompts: what a model is asked, without the answer.

Read in this order: `data_module` (batches of prompts), `read_prompts` (from rows), `prompt_tokens` (to token ids).
"""
