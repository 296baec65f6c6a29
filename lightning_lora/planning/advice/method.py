"""LoRA at which rank, QLoRA, or full fine-tuning: from the capacity of adapters and the memory of the devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_lora.memory.parts import MemoryParts
from lightning_lora.planning.adapter_sizes import AdapterSizes
from lightning_lora.planning.capacity import RANKS
from lightning_lora.planning.reason import Reason

DEFAULT_RANK = 32
"""The rank where less would do and memory allows it."""
CONVENTION = "convention; no source finds harm in a larger rank (TML: rank hardly matters early)"
NAMES = {"lora": "LoRA", "qlora": "QLoRA", "full": "full fine-tuning"}


@dataclass(frozen=True)
class Placement:
    """A method on the devices at hand, with one row on each.

    Args:
        strategy: ``"single"``, ``"ddp"`` or ``"fsdp2"``.
        memory: Bytes on one device with the smallest micro-batch; None if they could not be traced.
        traced_rank: The rank at which this was traced; None without adapters.
    """

    strategy: str
    memory: MemoryParts | None
    traced_rank: int | None = None

    def at_rank(self, rank: int, parameters: Mapping[int, int]) -> int:
        """Bytes on one device at another rank; 0 if they are not known.

        Adapters, their gradients and their optimizer state grow with the number of ``parameters`` of a rank.
        """
        if self.memory is None:
            return 0
        if self.traced_rank is None:
            return self.memory.total
        more = parameters[rank] - parameters[self.traced_rank]
        return self.memory.total + _by_rank(self.memory) * more // parameters[self.traced_rank]


@dataclass(frozen=True)
class Method:
    """The recommended method.

    Args:
        name: ``"lora"``, ``"qlora"`` or ``"full"``.
        rank: Rank of the adapters; None without any.
        strategy: ``"single"``, ``"ddp"`` or ``"fsdp2"``.
        fits: Whether it fits into the memory of the devices.
        verdict: ``"inside"``, ``"tight"``, ``"over"`` or ``"cannot tell"`` at this rank.
    """

    name: str
    rank: int | None
    strategy: str
    fits: bool
    verdict: str
    reasons: tuple[Reason, ...]


@dataclass(frozen=True)
class MethodChoices:
    """What a method is chosen from.

    Args:
        verdicts: The verdict of each rank that the layers allow.
        needed: The smallest rank that is inside; None if none is, or nothing is known.
        most_rank: The highest sensible rank, see `sensible_rank`.
        placements: Each method to the ways to place it, best first; empty if it is not available.
        asked_rank: The rank of the user's config, kept where nothing is known of the data.
        parameters: Trained parameters of each of these ranks.
        not_traced: Methods that could not be traced, with the reason. LoRA and full fine-tuning are chosen all the same
            where the data asks for them.
        too_large: Methods with a rank that were found not to fit.
    """

    verdicts: Mapping[int, str]
    needed: int | None
    most_rank: int
    placements: Mapping[str, Sequence[Placement]]
    budget: int
    asked_rank: int | None = None
    parameters: Mapping[int, int] = field(default_factory=dict)
    not_traced: Mapping[str, str] = field(default_factory=dict)
    devices: int = 1
    too_large: frozenset[tuple[str, int | None]] = frozenset()

    @property
    def least_rank(self) -> int:
        """The lowest rank there is."""
        return min(self.verdicts, default=1)

    def place(self, method: str, rank: int | None) -> Placement | None:
        """The first placement of a method that fits at this rank, or whose memory is not known."""
        if (method, rank) in self.too_large:
            return None
        ways = self.placements[method]
        if not ways and method in self.not_traced and method != "qlora":
            return Placement("single" if self.devices == 1 else "ddp", None)
        fits = (way for way in ways if way.at_rank(rank or self.least_rank, self.parameters) <= self.budget)
        return next(fits, None)


def choose_method(choices: MethodChoices) -> Method:
    """Choose: LoRA while adapters have room, QLoRA if the base does not fit otherwise, full if adapters are too small.

    If nothing fits, the method that is nearest is returned with ``fits=False``.
    """
    is_unknown = set(choices.verdicts.values()) <= {"cannot tell"}
    best = _best_verdict(choices)
    if best == "over" and not is_unknown and (way := choices.place("full", None)):
        fits = "fits" if way.memory is not None else "is not known not to fit"
        why = f"over at rank {choices.most_rank}, {_SENSIBLE}, and full fine-tuning {fits}"
        return Method("full", None, way.strategy, True, "over", (Reason("full fine-tuning", why, _BOUNDS),))
    wanted, reason = _wanted_rank(choices, is_unknown, best)
    for name in ("lora", "qlora"):
        for rank in [wanted, *sorted((rank for rank in choices.verdicts if rank < wanted), reverse=True)]:
            if way := choices.place(name, rank):
                return _adapted(choices, name, rank, wanted, way, reason)
    # Named by what comes nearest to fitting.
    least = choices.least_rank
    near = [
        (way.at_rank(least, choices.parameters), name, way) for name, ways in choices.placements.items() for way in ways
    ]
    _, name, way = min(near, key=lambda each: each[0])
    rank = None if name == "full" else least
    why = f"not even {NAMES[name]}{f' at rank {rank}' if rank else ''} with one row fits"
    verdict = "over" if name == "full" else choices.verdicts.get(least, "cannot tell")
    return Method(name, rank, way.strategy, False, verdict, (Reason("nothing fits", why, "traced"),))


_SENSIBLE = "the highest sensible rank (a quarter of the narrowest layer, at most 512; or 32 if smaller than the model)"
_BOUNDS = "bounds to memorise all: 1 token per parameter (Tinker), 2 bits per parameter at half use (arXiv 2404.05405)"


def sensible_rank(highest: int, sizes: AdapterSizes, full: int) -> int:
    """The highest rank to recommend: ``highest``, or up to 32 while adapters are smaller than the model itself.

    Args:
        highest: A quarter of the narrowest adapted weight, see `highest_rank`. One small layer (a head of a few
            classes, a first convolution) would otherwise decide for all.
        sizes: The sizes of the adapters.
        full: Parameters of the model.
    """
    small = [rank for rank in RANKS if rank <= DEFAULT_RANK and sizes.parameters(rank) < full]
    return max([highest, *small])


def _adapted(choices: MethodChoices, name: str, rank: int, wanted: int, way: Placement, reason: Reason) -> Method:
    reasons = [reason]
    if rank < wanted:
        why = f"rank {wanted} does not fit into memory, {rank} is the largest that does"
        reasons = [Reason(f"rank {rank}", why, "traced"), reason]
    if name == "qlora":
        why = "the base fits into memory in 4 bits only; 4 bits do not change what adapters can store"
        reasons.insert(0, Reason("QLoRA", why, "traced; arXiv 2305.14314"))
    verdict = choices.verdicts.get(rank, "cannot tell")
    if verdict == "over":
        why = "slower learning, no floor: try a RankProbe at half of the data, and watch with CapacityMonitor"
        reasons.append(Reason("expect", why, "TML"))
    return Method(name, rank, way.strategy, True, verdict, tuple(reasons))


def _best_verdict(choices: MethodChoices) -> str:
    """The best verdict of any sensible rank."""
    order = ("inside", "tight", "cannot tell", "over")
    found = {verdict for rank, verdict in choices.verdicts.items() if rank <= choices.most_rank}
    return next((verdict for verdict in order if verdict in found), "cannot tell")


def _wanted_rank(choices: MethodChoices, is_unknown: bool, best: str) -> tuple[int, Reason]:
    """The rank to use if memory allows, and why."""
    limit = max([rank for rank in choices.verdicts if rank <= max(choices.most_rank, 1)], default=1)
    least = min(DEFAULT_RANK, limit)
    if is_unknown or not choices.verdicts:
        rank = choices.asked_rank or min(DEFAULT_RANK, max(choices.verdicts, default=DEFAULT_RANK))
        why = "nothing is known of the information in the targets, so no rank can be derived; a RankProbe can tell"
        return rank, Reason(f"rank {rank}", why, "convention")
    if best in ("over", "tight") or choices.needed is None or choices.needed > limit:
        why = f"{_SENSIBLE}; the data is {best}"
        return limit, Reason(f"rank {limit}", why, _BOUNDS)
    rank = max(choices.needed, least)
    if rank == choices.needed:
        return rank, Reason(f"rank {rank}", "the smallest rank that is inside both bounds", _BOUNDS)
    return rank, Reason(f"rank {rank}", f"rank {choices.needed} would do by the bounds; more costs little", CONVENTION)


def smallest_change(memory: MemoryParts, budget: int, sharded: Mapping[int, MemoryParts], length: int | None) -> str:
    """The smallest change that would make a method fit, in words.

    Args:
        memory: The method that comes nearest, on one device with one row.
        sharded: The same divided by FSDP2 among more devices.
        length: Tokens of the longest row; None if rows are no token sequences.
    """
    changes = []
    fixed = memory.total - memory.activations - memory.logits
    if length is not None and fixed < budget:
        shorter = int(length * (budget - fixed) / max(1, memory.activations + memory.logits)) // 8 * 8
        if shorter >= 16:
            changes.append(f"rows of at most {shorter} tokens (max_length; now {length})")
    devices = next((count for count, parts in sorted(sharded.items()) if parts.total <= budget), None)
    if devices is not None:
        changes.append(f"{devices} such devices with FSDP2 (cli_configs/strategy/fsdp2.yaml)")
    changes.append(f"a device with {memory.total / 2**30:.3g} GiB, or a smaller model")
    return "; or ".join(changes)


def _by_rank(parts: MemoryParts) -> int:
    return dataclasses.replace(parts, weights=0, activations=0, logits=0, overhead=0).total


def strategy_setting(name: str) -> Any:
    """The Trainer's ``strategy`` for a name, as in ``cli_configs/strategy``."""
    if name == "fsdp2":
        return {"class_path": "lightning_lora.sharding.FSDP2Strategy"}
    return "ddp" if name == "ddp" else "auto"
