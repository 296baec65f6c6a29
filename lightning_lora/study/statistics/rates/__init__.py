"""Learning rates: one is chosen for each arm, on seeds and rows that the verdict never sees.

Read in this order: `sweep` (widens until the best rate is interior), `rate_vertex` (one rate between those measured),
`halving` (what may be given up early), `over_rates` (what several rates give together: envelope, expected best of a
budget).
"""
