"""The rows of an optimizer step: how many there are, how many would do, and how accumulation follows.

Read in this order: `division` (rows over ranks and micro-batches), `counting` (what a batch holds), `token_loss` (every
token counts the same), `accumulation` (changing it in a run), `trial_step` (how many rows fit); then from noise to a
verdict: the room `noise` (measuring), `history`, `calibration`, `judge`, `state`, `remarks`, `plot`.
"""
