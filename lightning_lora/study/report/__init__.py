"""Reports of runs and studies: one HTML file that needs nothing else, Markdown and CSV beside it. `docs/report.md`.

Read in this order: `write` (what ``lightning-lora report`` calls) and `watch`, `content` (what a report is made of),
`numbers` (how numbers are shown). A run: `run_record` (what its folder holds) with `losses`, then `run_page` from
`run_summary`, `run_curves`, `batch_panel`, `capacity_panel`, `run_health` and `run_origin`. A study: `study_facts`,
then `study_page` from `study_verdicts`, `study_arms`, `study_curves`, `study_rates` and `study_origin`. Drawing:
`axis`, `svg`, `line_chart`, `interval_chart`, `heat_map`. Writing: `html` (with ``page.html``, ``style.css`` and
``script.js``), `markdown`, `table`.
"""
