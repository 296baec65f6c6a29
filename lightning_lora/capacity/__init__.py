"""Whether adapters have room for what they learn: measurements during training, and the verdict.

Read in this order: `reading` (numbers and verdict), `fixed_rows` (what is measured on), `row_scores` (losses),
`half_rank` (truncated adapters), `tangent_capture` (what of the gradient adapters can follow), `layer_groups` (layers
by role, and their spectra), `measure` (all of them on one module), `heat_map` (pictures).
"""
