"""The rows of an optimizer step: how many there are, how many suffice, and how accumulation follows.

Read in this order: `division` (rows among ranks and micro-batches), `counting` (what a batch holds), `token_loss` (the
same weight for every token), `accumulation` (changing it during a run), `trial_step` (how many rows fit into memory).
Then, from noise to advice: the room `noise` (measures steps), `history` (averages over steps), `reading` (what an
estimate means), `judge` (reads a run), `calibration` (from a probe), `remarks`, `run_events` and `plot`.
"""
