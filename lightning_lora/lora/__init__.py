"""LoRA on any ``nn.Module``; knows torch only.

Read in this order: `config` (all settings), `adapter` (inject, merge, remove, state), `reports` (what was done,
counts), `patterns` (names of modules), `matched_rank`, `shards` (tensors in pieces), `fingerprint` (which base this
is); then the rooms `targets` (which weights, at which rank), `layers` (adapted modules) and `functional` (tensors).
"""
