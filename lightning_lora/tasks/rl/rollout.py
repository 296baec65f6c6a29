"""Completions that were sampled and scored, and the loader that makes them between two optimizer steps.

Shape legend: ``rows`` completions, ``group`` of them for each prompt and side by side; ``tokens`` positions of prompt
and completion, padded on the right. What belongs to a token stands at the position that predicts it, one before it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import Self

from lightning_lora.checkpoints.loader_position import obstacle, starting_after
from lightning_lora.checkpoints.random_state import kept_random_state
from lightning_lora.errors import DataError, PolicySettingError
from lightning_lora.sharding.collectives import gather_on_rank_zero


class Unrounded:
    """Floating-point tensors of a batch that stay as they are at every precision.

    ``bf16-true`` rounds all tensors that Lightning finds in a batch. It moves this object to the device, and looks no
    further.

    Args:
        tensors: The tensors by name.
    """

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def to(self, device: torch.device | str, **options: Any) -> Unrounded:
        """The same on another device."""
        return Unrounded(**{name: tensor.to(device, **options) for name, tensor in self.tensors.items()})


@dataclasses.dataclass
class Rollout:
    """Completions of a batch of prompts on one rank, with all that their training needs.

    Args:
        tokens: Integers, each ``(rows, tokens)``: ``input_ids``, and ``mask``, 1 at the positions whose next token is
            trained.
        lengths: Tokens of prompt and completion, ``(rows,)``.
        numbers: Floats, each ``(rows, tokens)``, such as ``sampler_logprobs`` and ``advantages``.
        group_size: Completions of each prompt.
        version: Optimizer steps done when they were sampled.
        orders: The prompts of each minibatch, in the order in which they are trained on.
        statistics: What is logged of it.
    """

    tokens: dict[str, Tensor]
    lengths: Tensor
    numbers: dict[str, Tensor]
    group_size: int
    version: int
    orders: list[Tensor]
    statistics: dict[str, float] = dataclasses.field(default_factory=dict)

    def minibatch(self, index: int) -> dict[str, Any]:
        """The minibatch with this number, cut to its longest row.

        Its first entry has one element per *prompt*: the completions of a prompt are compared with each other, so that
        prompts are what is independent in a batch.
        """
        prompts = self.orders[index]
        rows = (prompts[:, None] * self.group_size + torch.arange(self.group_size, device=prompts.device)).flatten()
        lengths = self.lengths[rows]
        width = int(lengths.max())
        tokens = {name: tensor[rows, :width] for name, tensor in self.tokens.items()}
        attended = torch.arange(width, device=lengths.device) < lengths[:, None]
        return {
            "prompts": prompts,
            **tokens,
            "attention_mask": attended.long(),
            "numbers": Unrounded(**{name: tensor[rows, :width] for name, tensor in self.numbers.items()}),
            "version": self.version,
            "statistics": self.statistics,
        }

    def fill(self, name: str, index: int, values: Tensor) -> None:
        """Keep ``values``, ``(rows, tokens)`` of the minibatch with this number, as numbers of this name."""
        if name not in self.numbers:
            self.numbers[name] = torch.zeros_like(self.numbers["sampler_logprobs"])
        prompts = self.orders[index]
        rows = (prompts[:, None] * self.group_size + torch.arange(self.group_size, device=prompts.device)).flatten()
        self.numbers[name][rows, : values.shape[1]] = values.to(self.numbers[name])

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors and plain types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device) -> Self:
        """The rollout whose state this is."""
        moved = {
            "tokens": {name: tensor.to(device) for name, tensor in state["tokens"].items()},
            "numbers": {name: tensor.to(device) for name, tensor in state["numbers"].items()},
            "lengths": state["lengths"].to(device),
            "orders": [prompts.to(device) for prompts in state["orders"]],
        }
        return cls(**{**state, **moved})


def minibatch_orders(num_prompts: int, minibatches: int, epochs: int, generator: torch.Generator) -> list[Tensor]:
    """Numbers of prompts for each minibatch: every epoch deals all prompts anew into parts of nearly equal size.

    Raises:
        ConfigError: If there are fewer prompts than minibatches.
    """
    if num_prompts < minibatches:
        raise PolicySettingError(
            f"minibatches={minibatches} of a rollout need as many prompts, and a batch of this rank holds "
            f"{num_prompts}: give the data a larger batch_size (and drop_last), or set fewer minibatches."
        )
    return [
        part
        for _ in range(epochs)
        for part in torch.randperm(num_prompts, generator=generator).tensor_split(minibatches)
    ]


def seed_of(*names: object) -> int:
    """A seed for a generator that these names alone decide."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:8], "big") >> 1


class RolloutLoader:
    """Turns batches of prompts into minibatches of completions of the present policy.

    It has a length: Lightning fetches ahead of a loader without one, and every rollout would be a step too old. The
    length is the same on all ranks, whatever was sampled. A rollout depends on the seed, the rank, the epoch and the
    number of the batch alone, so that nothing else need be saved of it than what it holds.

    Args:
        prompts: Loader of prompts on this rank.
        roll_out: Makes a `Rollout` of a batch of prompts with generators of its own, from a seed.
        minibatches: Minibatches of a rollout.
        epochs: Times that a rollout is trained on.
        trainer: The Trainer that trains on it.
        seed: Decides the order of the prompts and what is sampled.

    Raises:
        ConfigError: If the prompts do not come from a ``DataLoader`` over rows that are read by number.
    """

    def __init__(
        self,
        prompts: DataLoader[Any],
        roll_out: Callable[[Any, int], Rollout],
        minibatches: int,
        epochs: int,
        trainer: Trainer,
        seed: int,
    ) -> None:
        if (reason := obstacle(prompts, 0)) is not None:
            raise PolicySettingError(
                f"a policy needs prompts from a DataLoader over rows with numbers, which can go on where a run has "
                f"stopped: {reason}."
            )
        self.prompts, self.roll_out, self.trainer, self.seed = prompts, roll_out, trainer, seed
        self.per_rollout = minibatches * epochs
        self._minibatches = minibatches
        self._epoch = -1
        self._next_batch = 0
        self._next_minibatch = 0
        self._rollout: Rollout | None = None

    @property
    def batch_size(self) -> int | None:
        """Prompts of a minibatch."""
        return None if self.prompts.batch_size is None else max(1, self.prompts.batch_size // self._minibatches)

    def __len__(self) -> int:
        return len(self.prompts) * self.per_rollout

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._epoch != self.trainer.current_epoch:
            self._epoch, self._next_batch, self._rollout = self.trainer.current_epoch, 0, None
        if self._rollout is not None:
            yield from self._rest()
        for batch in self._batches():
            self._next_batch += 1
            self._rollout, self._next_minibatch = self.roll_out(batch, self._seed_of_rollout()), 0
            yield from self._rest()

    def state_dict(self) -> dict[str, Any]:
        """Where every rank stands, and the rollout that it is in; a collective."""
        own = {
            "epoch": self._epoch,
            "next_batch": self._next_batch,
            "next_minibatch": self._next_minibatch,
            "seed": self.seed,
            "rollout": None if self._rollout is None else self._rollout.state_dict(),
        }
        return {"ranks": gather_on_rank_zero(own), "per_rollout": self.per_rollout}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken; between two rollouts on any number of ranks.

        Raises:
            DataError: If the state is that of another number of ranks, or of other minibatches, inside a rollout.
        """
        ranks, world = state["ranks"], self.trainer.world_size
        is_inside = any(own["rollout"] is not None for own in ranks)
        if is_inside and (len(ranks) != world or state["per_rollout"] != self.per_rollout):
            done, left = ranks[0]["next_minibatch"], state["per_rollout"] - ranks[0]["next_minibatch"]
            raise DataError(
                f"this checkpoint was written inside a rollout, after {done} of its {state['per_rollout']} "
                f"minibatches on {len(ranks)} ranks, and this run has {world} ranks and {self.per_rollout} "
                f"minibatches: a rollout belongs to the ranks that sampled it. Resume with the same numbers, or from "
                f"a checkpoint between two rollouts ({done} batches earlier or {left} later)."
            )
        own = ranks[self.trainer.global_rank if len(ranks) == world else 0]
        self._epoch, self.seed = own["epoch"], own["seed"]
        self._next_batch, self._next_minibatch = own["next_batch"] * len(ranks) // world, own["next_minibatch"]
        device = self.trainer.strategy.root_device
        self._rollout = None if own["rollout"] is None else Rollout.from_state_dict(own["rollout"], device)

    def _rest(self) -> Iterator[dict[str, Any]]:
        """The minibatches of the rollout that are left."""
        rollout = self._rollout
        assert rollout is not None
        for index in range(self._next_minibatch, self.per_rollout):
            minibatch, self._next_minibatch = rollout.minibatch(index), index + 1
            if self._next_minibatch == self.per_rollout:
                self._rollout = None  # a checkpoint after the last minibatch stands between two rollouts
            yield minibatch

    def _batches(self) -> Iterator[Any]:
        """The batches of prompts of the present epoch that are left."""
        _set_sampler_epoch(self.prompts, self._epoch)
        # A random order is drawn with the first batch, from the global generator.
        with kept_random_state(torch.device("cpu")), starting_after(self._next_batch, [self.prompts]):
            torch.manual_seed(seed_of(self.seed, self._epoch))
            batches = iter(self.prompts)
            batch = next(batches, None)
        while batch is not None:
            yield batch
            batch = next(batches, None)

    def _seed_of_rollout(self) -> int:
        return seed_of(self.seed, self.trainer.global_rank, self._epoch, self._next_batch)
