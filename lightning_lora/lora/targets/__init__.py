"""Targets: which weights are adapted, and at which rank.

Read in this order: `resolve` (from settings to targets, and weights that none can mean), `adaptable` (which weights can
be adapted), `roles` (attention, mlp, experts, head, ...), `selection` (roles and patterns that the settings ask for),
`ranks`, `shared_weights` (tied embeddings and heads), `uncalled_layers` (weights that a model reads without calling
their layer), `called_together` (layers that a model calls with one input), `new_weights` (weights that no checkpoint
holds), `unused_settings`.
"""
