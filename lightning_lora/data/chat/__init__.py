"""Chat templates: from a conversation to text, and to the parts of it that the model writes itself.

Read in this order: `template` (which template, and what it is given), `endings` (the token that ends an answer).
"""
