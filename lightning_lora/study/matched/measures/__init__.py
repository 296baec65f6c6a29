"""What a run of a study measures beside its losses on rows: `curve` (losses against steps), `evaluations` (on a
log-spaced grid, beside the training), `energy` (of the GPU).
"""
