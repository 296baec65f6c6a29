"""Raises the rank of groups of layers that use theirs, while a run trains."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_lora.batch.run_events import RunEvents
from lightning_lora.checkpoints.random_state import kept_random_state
from lightning_lora.errors import RankChangeError, check_arguments, check_count
from lightning_lora.lightning_private import trains_in_children
from lightning_lora.lora.grown_state import check_can_grow, extend_state
from lightning_lora.lora.growth import grow_adapters
from lightning_lora.lora.growth_plan import GroupGrowth, num_factor_parameters, plan_growth
from lightning_lora.lora.layers.adapted import adapted_weights, factor_parameters, held_factors
from lightning_lora.trainer_access import found

from .adapter_ema import AdapterEMA


class RankGrowth(Callback):
    """Doubles the rank of groups of layers that use theirs, under a budget of parameters.

    A group is the layers with one parent, such as an attention or an MLP. It grows where half of its rank could not
    hold its update: where the singular values after the first ``rank // 2`` have at least ``threshold`` of the squares
    of all. Groups that use most of their rank come first. This measures rank that is used, not rank that is short.

    The module computes the same before and after, as the new part starts at zero and the scale stays. The state of the
    optimizer is extended (`lightning_lora.lora.grown_state.extend_state`), an `AdapterEMA` follows, and DDP is set up
    anew. Groups grow before the first batch of an optimizer step. Checkpoints hold the ranks; a module with the
    settings that the run began with takes them over when it loads one. Each growth is printed, and is an event
    ``rank_growth`` in ``events.jsonl``.

    Args:
        max_rank: The highest rank of a weight. None: four times its rank at the start.
        budget: The most adapter parameters. None: twice those at the start.
        every_n_steps: Optimizer steps from one look at the ranks to the next. None: a tenth of the run, and none in its
            second half, which would be too short for the new part to learn; 100 if the length is unknown.
        threshold: Share of an update, in ``(0, 1]``, that half the rank must lack.

    Attributes:
        growths: What has grown, in order: the ``step`` and the fields of `GroupGrowth`.

    Raises:
        ConfigError: If a number is out of range; at the start of ``fit`` without adapters, with manual optimization, a
            strategy other than one device or DDP, `WeightAveraging`, or frozen copies of the network.
    """

    def __init__(
        self,
        max_rank: int | None = None,
        budget: int | None = None,
        every_n_steps: int | None = None,
        threshold: float = 0.1,
    ) -> None:
        check_arguments(RankGrowth, locals(), RankChangeError)
        for name, value in (("max_rank", max_rank), ("budget", budget), ("every_n_steps", every_n_steps)):
            check_count(name, value, RankChangeError, optional=True)
        if not 0 < threshold <= 1:
            raise RankChangeError(f"threshold must be in (0, 1], got {threshold!r}.")
        self.max_rank, self.budget = max_rank, budget
        self.every_n_steps, self.threshold = every_n_steps, threshold
        self._forget()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run in which ranks cannot change, and forget the previous run."""
        if stage == "fit":
            _refuse_trainer(trainer, pl_module)
            self._forget()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the module has adapters that can grow."""
        self._has_checked_state = False
        if not adapted_weights(pl_module):
            raise RankChangeError(
                "RankGrowth has no adapters to grow: the module has lora=None, or nothing is adapted."
            )
        if held_factors(pl_module):
            raise RankChangeError(
                "RankGrowth cannot grow a network of which the module holds a frozen copy (a teacher or target "
                "network): the copy would keep the old rank. Give the layers that need it a rank by rank_pattern."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note ranks and parameters at the start of the run, unless a checkpoint has told them."""
        self._events = RunEvents(trainer, "RankGrowth")
        if not self._start:
            weights = adapted_weights(pl_module)
            ranks = {name: layer.lora_specs[weight].rank for name, (layer, weight) in weights.items()}
            num_steps = float(trainer.estimated_stepping_batches)
            self._start = {"ranks": ranks, "parameters": num_factor_parameters(pl_module), "steps": num_steps}
        budget, present = self._most_parameters(), num_factor_parameters(pl_module)
        if budget < present:
            raise RankChangeError(
                f"budget is {budget:,} adapter parameters, fewer than the {present:,} that the run has."
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let groups grow where an optimizer step begins; a checkpoint of the step before does not hold the growth."""
        step = trainer.global_step
        if step and not self._has_checked_state:
            _check_states(trainer, pl_module)
            self._has_checked_state = True
        if step == self._last_look or not self._is_due(step):
            return
        self._last_look = step
        plan = plan_growth(pl_module, self._highest(pl_module), self._most_parameters(), self.threshold)
        # Rounding may differ between ranks, a decision must not.
        plan = trainer.strategy.broadcast(plan)
        if plan:
            _check_states(trainer, pl_module)  # factors whose gradient came late have a state only now
            _grow(trainer, pl_module, {name: rank for growth in plan for name, rank in growth.after.items()})
            self._report(trainer, pl_module, plan)

    @override
    def state_dict(self) -> dict[str, Any]:
        """What has grown, and the ranks, parameters and steps that the run began with."""
        return {"start": self._start, "last_look": self._last_look, "growths": self.growths}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the growth of an interrupted run."""
        self._start, self._last_look = state_dict["start"], state_dict["last_look"]
        self.growths = list(state_dict["growths"])

    def _forget(self) -> None:
        self._start: dict[str, Any] = {}
        self._last_look = 0
        self._has_checked_state = False
        self.growths: list[dict[str, Any]] = []

    def _is_due(self, step: int) -> bool:
        if self.every_n_steps is not None:
            return step % self.every_n_steps == 0
        num_steps = self._start["steps"]
        if not math.isfinite(num_steps):
            return step % 100 == 0
        return step % max(1, int(num_steps) // 10) == 0 and step <= num_steps / 2

    def _most_parameters(self) -> int:
        return 2 * self._start["parameters"] if self.budget is None else self.budget

    def _highest(self, module: LightningModule) -> dict[str, int]:
        """The rank at which each adapted weight stops to grow."""
        highest = {}
        for name, (layer, weight) in adapted_weights(module).items():
            shape = layer.weights(layer)[weight]
            limit = 4 * self._start["ranks"][name] if self.max_rank is None else self.max_rank
            highest[name] = min(limit, shape.num_in, shape.num_out)
        return highest

    def _report(self, trainer: Trainer, module: LightningModule, plan: list[GroupGrowth]) -> None:
        step, budget, present = trainer.global_step, self._most_parameters(), num_factor_parameters(module)
        for growth in plan:
            present_then = present - sum(later.parameters for later in plan[plan.index(growth) + 1 :])
            values = vars(growth) | {"parameters": present_then, "budget": budget}
            self.growths.append({"step": step, **values})
            self._events.write("rank_growth", step, values)
            rank_zero_info(
                f"rank growth at step {step}: {growth.group} {_in_words(growth)} (half the rank lacks "
                f"{growth.beyond_half:.0%} of its update); {present_then:,} of {budget:,} adapter parameters"
            )
        for logger in trainer.loggers:
            logger.log_metrics({"rank/parameters": present}, step)


def _check_states(trainer: Trainer, module: LightningModule) -> None:
    for optimizer in trainer.optimizers:
        check_can_grow(optimizer, factor_parameters(module).values())


def _grow(trainer: Trainer, module: LightningModule, ranks: dict[str, int]) -> None:
    """Raise ranks between two optimizer steps, with all that depends on the shapes of factors."""
    before = {factor: factor.shape for factor in factor_parameters(module).values()}
    strategy = trainer.strategy
    seed = strategy.broadcast(int(torch.randint(2**31, ())))
    if isinstance(strategy, DDPStrategy):
        # Its reducer hangs on the gradients of the old shapes.
        strategy.model._remove_autograd_hooks()  # pyright: ignore[reportOptionalMemberAccess, reportCallIssue]
        strategy.model = module
    with kept_random_state(strategy.root_device):
        torch.manual_seed(seed)
        grow_adapters(module, ranks)
    grown = {factor: shape for factor, shape in before.items() if factor.shape != shape}
    for optimizer in trainer.optimizers:
        extend_state(optimizer, grown)
    if ema := found(trainer, AdapterEMA):
        ema.follow_growth(module)
    if isinstance(strategy, DDPStrategy):
        strategy.configure_ddp()


def _in_words(growth: GroupGrowth) -> str:
    """The ranks before and after of a group, each pair once: ``8 -> 16``."""
    pairs = dict.fromkeys((growth.before[name], growth.after[name]) for name in growth.after)
    return ", ".join(f"{before} -> {after}" for before, after in pairs)


def _refuse_trainer(trainer: Trainer, module: LightningModule) -> None:
    strategy = trainer.strategy
    if isinstance(strategy, DeepSpeedStrategy) or not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise RankChangeError(
            f"RankGrowth cannot change the shapes that {type(strategy).__name__} has sharded: train on one device or "
            f"with DDP, or choose ranks before training (lightning_lora.lora.allocation.allocate_ranks)."
        )
    if trains_in_children(trainer):
        raise RankChangeError(
            "RankGrowth needs processes that begin with the script, because the calling process of ddp_spawn, ddp_fork "
            "and ddp_notebook takes trained weights back at the ranks it knows: use strategy='ddp'."
        )
    if not module.automatic_optimization:
        raise RankChangeError(
            "RankGrowth needs automatic optimization: with manual optimization it cannot see where a step begins."
        )
    if callback := found(trainer, WeightAveraging):
        raise RankChangeError(
            f"{type(callback).__name__} keeps a copy of the module, whose ranks would not grow: use AdapterEMA."
        )
