"""The statistics of few seeds: pure functions on numbers, see docs/understand/study_statistics.md.

Read in this order: `interval` (a mean difference, its interval and p-values), `crossed` (the interval over seeds and
rows), `word` (matches, behind, ahead, cannot tell), `arm` (the runs of one arm), `compare` (an arm with its baseline),
`verdict` (what is found, and its sentence), `holm` (several comparisons), `needed` (seeds and rows that would do),
`seed_plan` (3, 5, 8 seeds and their price), `power` (the chance of each word), `before_start` (what to print before a
study starts). `rates` chooses the learning rate of an arm. Other questions: `steps_to_loss`, `stays_behind` (since
when), `batch_penalty`.
"""
