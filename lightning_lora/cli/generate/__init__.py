"""The command ``generate``: what a trained model answers, beside what its base answers.

Read in this order: `command` (the whole way), `source` (what the user named), `run_settings` (how the run has made
tokens of rows), `loading` (model, tokenizer and base), `prompts` (from files), `decoding` (token ids to token ids),
`answers` (conversations to answers, for Python too), `view` (the terminal), `answer_file` (JSONL), `chat` (a
conversation at the terminal).
"""
