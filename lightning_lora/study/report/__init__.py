"""Reports of runs and studies: one HTML file that needs nothing else, Markdown and CSV beside it. `docs/use/report.md`.

Read in this order: `write` (what ``lightning-lora report`` calls) and `watch`, `content` (what a report is made of),
`numbers` (how they and verdicts are shown), `runs` (the report of a run), `studies` (that of a study), `task_panel`
(benchmarks of either), `side_by_side` (runs that are no study), `charts` (drawing), `html` (with ``page.html``,
``style.css`` and ``script.js``), `markdown`, `table`.
"""
