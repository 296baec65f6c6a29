"""The report of a study, finished or not.

Read in this order: `study_facts` (what all parts ask) and `arm_settings` (rank and batch of an arm), then `study_page`
and its parts: `study_verdicts`, `study_arms`, `study_curves` with `study_steps`, `study_rates`, `study_capacity`,
`study_batch`, `study_health` (failed runs) and `study_origin`.
"""
