"""Triton kernels that do in one pass over memory what torch does in several, used where a measurement says so.

Read in this order: `choice` (where a kernel is used; the one setting), `gate` (``silu(gate) * up`` and its gradients),
`narrow` (two products from one read), `cross_entropy` (a loss and its gradient in place of the scores). The last three
import Triton, so whoever uses them imports them after `choice` has chosen them.
"""

from lightning_lora.lora.functional.kernels.choice import chosen

__all__ = ["chosen"]
