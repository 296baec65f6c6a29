"""Many arms on one frozen base, in one process: LoRA runs that take turns, or share batches.

Read in this order: `bank` (what a user calls), `turns` (functions in threads, one at a time) with `process_state` (what
each of them has of its own), `arm` (the callback that puts a Trainer in its place), `shared_base` (weights that are
stored once), `exactness` (why not); for arms in one batch `rows` (where they meet), `joint_pass` (forward and backward
for all of them), `joint_layers` (the update of each arm on its own rows), `joining` (batches as one, outputs apart) and
`module_state` (what a pass leaves in a module).
`groups` says which runs of a study do so, and `mode` how, where nobody has said it.
"""
