"""Which weights are adapted, and at which rank.

Read in this order: `resolve` (from settings to specs), `adaptable` (what can be adapted), `roles` (attention, mlp,
experts, head, ...), `selection` (what a setting selects), `ranks`, `shared_weights` (tied embeddings and heads),
`uncalled_layers` (weights that a model reads without calling their layer).
"""
