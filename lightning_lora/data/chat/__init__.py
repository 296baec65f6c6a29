"""Chat templates: from a conversation to tokens, and to those of them that the model writes itself.

Read in this order: `template` (which template, and how it renders), `bounded` (operators and filters that make nothing
huge), `limits` (what rendering may take), `variables` (what users give it), `names` (what it reads), `endings` (the
token that ends an answer), `profile` (all that is known before the first row), `answer` (one answer as inference sees
it), `turns` (the answers of a conversation), `long` (of many turns), `masks` (to tokens).
"""
