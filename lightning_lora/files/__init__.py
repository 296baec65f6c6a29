"""Files that are written and read back: old or new, never a mix, and never unpickled. This room knows torch only.

Read in this order: `atomic` (every write), `json_object`, `yaml_text`, `safetensors_file` and `safetensors_header`,
`checkpoint_manifest`, `whole_checkpoint` and `lightning_checkpoint` (reading a ``.ckpt`` safely), `events` (a log in
lines), `generation_config` (where a model stops), `folder_lock`, `scratch`; then the rooms `adapter` (PEFT folders) and
`merge` (folding adapters in, on disk and in memory).
"""
