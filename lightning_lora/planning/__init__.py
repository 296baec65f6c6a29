"""Before training: what is in the data, whether adapters have room for it, what a run takes, and what to do.

`data_counts` (rows and tokens of the data), `count_data` (how they are found), `set_up_data` (a data module as training
sets it up), `token_rows` (rows of tokens), `label_counts` (labels of any other data), `dataset_targets` (where these
are in a dataset), `adapter_sizes` (trained parameters at every rank), `capacity` (whether they have room for the data),
`capacity_sentence` (the same in words), `base_bits` (what the base does not know of the data yet), `reason` (why a
value was chosen).
"""
