"""The ways to write a training example: from the columns of a row to a conversation or a text.

Read in this order: `find` (the formats, and which one a row has), `names` (known columns and keys, and how a user's
names are mapped to them), `row` (one row while it is read), `turns` (lists of messages), `question` (a question and its
answer in columns), `beside` (columns beside both, such as ``system`` and ``tools``), `roles`, `content` (the text of a
message), `tools` (calls and definitions of tools), `pairs` (two answers to compare), `values` (checks of single
values), `suggest` (what to write for unknown columns).

Data modules without answers read their columns by the same functions: a `NamedRow` of `row`, then `turns.read_turns`,
`question.read_question`, `beside.read_variables`.
"""
