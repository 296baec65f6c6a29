"""What is written and read back: old or new, never a mix, never unpickled; knows torch only.

Read in this order: `atomic` (every write), `safetensors_file` and `safetensors_header`, `checkpoint_manifest`,
`whole_checkpoint` and `lightning_checkpoint` (reading a ``.ckpt`` safely), `events` (a log by lines), `folder_lock`,
`scratch`; then the rooms `adapter` (PEFT folders) and `merge` (folding adapters in, on disk and in memory).
"""
