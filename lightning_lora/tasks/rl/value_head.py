"""What a policy expects of a completion, read off the hidden state of each token."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import override


class ValueHead(nn.Linear):
    """A linear layer from hidden states to one value, in float32. It starts at 0.

    Args:
        dim: Features of the hidden states.

    Shape:
        - Input ``(rows, tokens, dim)``, output ``(rows, tokens)``.
    """

    is_for_training_only = True
    """Adapter folders leave it out: what has been trained is the model."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    @override
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input.float(), self.weight.float(), self.bias.float()).squeeze(-1)
