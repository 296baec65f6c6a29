"""Before training: what is in the data, whether adapters have room for it, what a run takes, and what to do.

`data_counts` (rows and tokens of the data), `reason` (why a value was chosen). Cost:
`devices` with `device_table`, `cost` (operations, disk, time from data sheets), `timed_steps` (time from real steps).
"""
