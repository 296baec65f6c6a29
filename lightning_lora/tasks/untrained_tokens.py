"""Tokens that the output layer never learned: with the layer frozen, no LoRA below it can make a model write them.

The logit of a token is the product of its row with the hidden state. Where rows are equal the logits are equal, for
every hidden state; and the mean of all rows never has the largest. Rows of tokens that occur in no training text become
equal in pre-training, and ``resize_token_embeddings`` gives new tokens the mean.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.data.chat.template import find_template
from lightning_lora.errors import ConfigError
from lightning_lora.lora.layers.base import LoRALayer
from lightning_lora.lora.shards import is_flattened

EQUAL = 0.999
"""Cosine above which two rows count as equal; in the models that this was tried on, trained rows stay below 0.9."""
_ZERO = 1e-3
"""A row this much shorter than the median one holds nothing."""
_CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Unlearnable:
    """Tokens that a model cannot learn to write with the settings of this run.

    Args:
        tokens: Id to text of each token.
        ends: Ids of those of the tokens that end an answer.
        is_tied: Whether the output layer shares its weight with the embedding.
        reads: Whether the embeddings of all of them were trained, or learn.
    """

    tokens: Mapping[int, str]
    ends: frozenset[int]
    is_tied: bool
    reads: bool

    def advice(self, labels: Tensor) -> str | None:
        """What to tell the user if the training rows hold some of the tokens; None if they hold none.

        Args:
            labels: Supervised tokens of a batch, in any shape.
        """
        held = torch.stack([(labels == token).any() for token in self.tokens]).tolist()
        found = [token for token, is_held in zip(self.tokens, held, strict=True) if is_held]
        if not found:
            return None
        names = ", ".join(repr(self.tokens[token]) for token in found)
        cannot = "stop" if self.ends.intersection(found) else "write what it was not trained on"
        settings = "adapt_head=True"
        if self.is_tied:
            settings += " and tied_weights='both' (or 'untie')"
        elif not self.reads:
            settings += " and adapt_embeddings=True (their embeddings are untrained too)"
        return (
            f"the output layer was never trained on {names}, which the answers hold: a row of it equals those of other "
            f"tokens or is new. LoRA leaves this layer as it is, so the model cannot learn to {cannot}. "
            f"Set {settings} in lora."
        )


def unlearnable_tokens(
    model: Any, tokenizer: Any, ends: Collection[int], stops: Collection[int], others: Iterable[str | None], known: Any
) -> Unlearnable | None:
    """The special tokens that answers may hold and a model cannot learn to write; None if there are none.

    Args:
        model: A transformers model, adapted.
        tokenizer: The tokenizer, with the template of the run.
        ends: Ids of the tokens that end an answer.
        stops: Ids at which generation stops. A row that equals only those of other stops is no hindrance.
        others: Texts of further tokens in the answers.
        known: Number of tokens in the checkpoint, or None; later ones were added after the pre-training.
    """
    weight = frozen_output(model)
    if weight is None:
        return None
    tokens = written_tokens(tokenizer, ends, others)
    found = untrained_tokens(weight, tokens, stops, known)
    if not found:
        return None
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    is_tied = embedding is weight
    reads = is_tied or _is_learnt(model.get_input_embeddings(), found, known)
    texts = tokenizer.convert_ids_to_tokens(found)
    return Unlearnable(dict(zip(found, texts, strict=True)), frozenset(ends) & frozenset(found), is_tied, reads)


def frozen_output(model: Any) -> Tensor | None:
    """The weight of the output layer if training leaves it as it is; None if it learns, or is not whole on this rank.

    Args:
        model: A transformers model, adapted.
    """
    return _frozen_table(model.get_output_embeddings())


def _frozen_table(layer: Any) -> Tensor | None:
    weight: Any = getattr(layer, "weight", None)
    if isinstance(layer, LoRALayer) or type(weight) not in (Tensor, nn.Parameter) or weight.ndim != 2:
        return None
    usable = weight.is_floating_point() and weight.itemsize > 1 and not weight.is_meta and not is_flattened(weight)
    return weight if usable and not weight.requires_grad else None


def _is_learnt(embedding: Any, tokens: list[int], known: int | None) -> bool:
    """Whether an embedding tells ``tokens`` from others, or learns to."""
    table = _frozen_table(embedding)
    return table is None or not untrained_tokens(table, tokens, (), known)


def written_tokens(tokenizer: Any, ends: Iterable[int], others: Iterable[str | None] = ()) -> list[int]:
    """Ids of the special tokens that an answer may hold: its ends, and those that stand in the chat template.

    Args:
        tokenizer: The tokenizer, with the template of the run.
        ends: Ids of tokens that end an answer.
        others: Texts of further tokens.
    """
    try:
        template = find_template(tokenizer) or ""
    except ConfigError:
        template = ""
    added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items()}
    named = [id for text, id in added.items() if text.strip() and text in template]
    others = [added[text] for text in others if text in added]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*ends, *others, *eos, *named]))


def untrained_tokens(weight: Tensor, tokens: Sequence[int], ends: Collection[int], num_known: int | None) -> list[int]:
    """Ids of the ``tokens`` whose rows were never trained, and so cannot be told from others.

    Args:
        weight: Weight of the output layer, ``(vocab, dim)``.
        tokens: Ids to look at.
        ends: Ids at which generation stops. An end may be equal to another end, as in a copy of its row.
        num_known: Number of tokens in the checkpoint; later ones were added after the pre-training.
    """
    added = [token for token in tokens if num_known is not None and token >= num_known]
    known = [token for token in tokens if token < min(len(weight), num_known or len(weight))]
    return added + (_equal_to_others(weight.detach(), known, ends) if known else [])


@torch.no_grad()
def _equal_to_others(weight: Tensor, tokens: list[int], ends: Collection[int]) -> list[int]:
    rows = F.normalize(weight[tokens].float(), dim=1)
    total, counts, lengths = torch.zeros_like(rows[0]), torch.zeros(len(tokens), device=rows.device), []
    for chunk in weight.split(_CHUNK_ROWS):
        values = chunk.float()
        total += values.sum(0)
        lengths.append(values.norm(dim=1))
        counts += _num_equal(rows, values)
    stops = [end for end in ends if end < len(weight)]
    allowed = torch.ones_like(counts)
    for i, token in enumerate(tokens):
        if token in stops:
            allowed[i] = _num_equal(rows[i : i + 1], weight[stops].float())
    is_mean = _num_equal(rows, total[None]) > 0
    length = torch.cat(lengths)
    is_zero = length[tokens] <= _ZERO * length.median()
    return [token for token, found in zip(tokens, (counts > allowed) | is_mean | is_zero, strict=True) if found]


def _num_equal(rows: Tensor, others: Tensor) -> Tensor:
    """How many of ``others`` each of the normalised ``rows`` is equal to."""
    return (rows @ F.normalize(others, dim=1).T > EQUAL).sum(1)
