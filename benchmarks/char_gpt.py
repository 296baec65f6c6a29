"""A plain GPT over characters, as nanoGPT's: what people train from scratch on a laptop."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Causal self-attention with one fused input projection; no dropout.

    Shape:
        - Input and output: ``(batch, tokens, width)``.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = [part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1)]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Four times as wide inside, GELU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.c_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Pre-norm attention and MLP, each on a residual path."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width, bias=False), Attention(width, num_heads)
        self.ln_2, self.mlp = nn.LayerNorm(width, bias=False), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class CharGPT(nn.Module):
    """Character ids ``(batch, tokens)`` to logits ``(batch, tokens, vocab)``.

    Args:
        width: Of the residual stream.
        num_layers: Blocks.
        num_heads: Of attention; divides ``width``.
        vocab_size: Characters.
        context: Longest row, tokens.
    """

    def __init__(self, width: int, num_layers: int, num_heads: int, vocab_size: int, context: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, width), nn.Embedding(context, width)
        self.h = nn.ModuleList(Block(width, num_heads) for _ in range(num_layers))
        self.ln_f = nn.LayerNorm(width, bias=False)
        self.lm_head = nn.Linear(width, vocab_size, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        """The table of characters, by the name transformers gives it."""
        return self.wte

    def hidden(self, input_ids: Tensor) -> Tensor:
        """What the output layer is given, ``(batch, tokens, width)``."""
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.h:
            x = block(x)
        return self.ln_f(x)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.hidden(input_ids))
