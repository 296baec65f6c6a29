"""LoRA on any ``nn.Module``; knows torch only.

Read in this order: `config` (all settings), `adapter` (inject, merge, remove, state dict), `reports` (what was done,
parameter counts), `patterns` (names of modules), `matched_rank` (comparisons at equal size), `shards` (sharded
tensors), `base_values` (the base of modules trained in full), `fingerprint` (digests of the base); then the rooms
`targets` (which weights, at which rank), `layers` (adapted modules) and `functional` (tensors).
"""
