"""LoRA on any ``nn.Module``; knows torch only.

Read in this order: `config` (all settings), `adapter` (inject, remove, disable, state dict), `merging` (into the base
weights and back), `reports` (what was done, parameter counts), `patterns` (names of modules), `matched_rank`
(comparisons at equal size), `growth` (a higher rank), `growth_plan` (which layers get one), `grown_state` (their
optimizer state), `allocation` (ranks of layers from a gradient), `gradient_start` (first values from a gradient),
`shards` (sharded tensors), `fingerprint` (digests of the base), `changed_tensors` (buffers and others that training
changes without an optimizer), `base_values` (the base of modules trained in full), `frozen_copies` (teachers and target
networks), `vocabulary` (the check that it was not resized), `merged_saving` (``save_pretrained`` of an adapted model),
`evaluation_mode` (for a while);
then the rooms `targets` (which weights, at which rank), `layers` (adapted modules) and `functional` (tensors).
"""

from lightning_lora.versions import check_own_versions

# Whoever uses adapters comes by here first: with an unsupported version the reason is told before something else fails.
check_own_versions()
