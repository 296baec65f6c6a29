"""The report of a study, finished or not.

Read in this order: `study_facts` (what all parts ask), then `study_page` and its parts: `study_verdicts`, `study_arms`,
`study_curves`, `study_rates` (with the failed runs), `study_monitors` and `study_origin`.
"""
