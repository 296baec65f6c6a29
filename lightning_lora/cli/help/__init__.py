"""What helps before a run: at the prompt, in an editor, and in a bug report.

Read in this order: `command` (what a command is), `short_help` (the options of ``fit`` that people need first),
`recipes` (the configs that come with the package), `schema` (a JSON schema of configs for editors), `completion` (of a
shell), `environment` (this machine, to paste into an issue), `commands` (those that show these).
"""
