"""Before training: what is in the data, whether adapters have room for it, what a run takes, and what to do.

`data_counts` (rows and tokens of the data), `count_data` (how they are found), `set_up_data` (a data module as training
sets it up), `token_rows` (rows of tokens), `label_counts` and `dataset_targets` (labels of any other data),
`adapter_sizes` (trained parameters at every rank), `capacity` (whether they have room for the data) and
`capacity_sentence` (the same in words), `base_bits` (what the base does not know of the data yet), `device_table` and
`devices` (what a run is planned for), `cost` (operations, disk, time), `stop_signals` (what ends a plan at once),
`timing` and `timed_steps` (what is timed here), `reason` (why a value was chosen), `advice` (what is recommended, and
how it is told), `bad_input` (what is refused at once), `plan` (everything together) and `make_plan` (how it is made).
"""
