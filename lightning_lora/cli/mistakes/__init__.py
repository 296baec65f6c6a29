"""What is wrong with a command line, in one line: `config_files` (the files), `values` (settings of a wrong type),
`class_paths` and `options` (names that are not known), `renamed` (old names of options), `running` (what the Trainer
would find later), `writing` (files that cannot be written),
`printed` (what `--print_config` would show, and `fit` refuse).
"""
