"""Whether rewards differ, so that there is something to learn, and how much they can have taught."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass
class LearningSignal:
    """Follows the rewards of a run.

    Args:
        patience: Rollouts in succession without any difference within a group after which a run is without a signal.
        num_silent: Rollouts without a difference up to now, in succession.
        had_any: Whether any rollout had one.
        episodes: Completions up to now, on all ranks.
        bits: Upper bound of what their rewards can have taught.
    """

    patience: int
    num_silent: int = 0
    had_any: bool = False
    episodes: int = 0
    bits: float = 0.0

    def add(self, has_advantage: bool, episodes: int, bits: float) -> str | None:
        """Count a rollout; returns what to tell the user once patience is over.

        Args:
            has_advantage: Whether any completion of any rank has an advantage other than 0.
            episodes: Completions of all ranks.
            bits: See `reward_bits`, of all ranks.
        """
        self.episodes += episodes
        self.bits += bits
        self.had_any = self.had_any or has_advantage
        self.num_silent = 0 if has_advantage else self.num_silent + 1
        if self.num_silent != self.patience:
            return None
        return (
            f"no learning signal: for {self.patience} rollouts all completions of a prompt had the same reward, so "
            "nothing is learned, and the run ends. The model never does the task, or always does it, or the reward "
            "does not see what it should: look at completions, train on examples first, choose easier or harder "
            "prompts, or give partial rewards."
        )

    def budget(self, num_parameters: int) -> str:
        """The information that rewards can have taught, beside the parameters that were to hold it."""
        return (
            f"information budget: {self.episodes:,} completions with {self.bits:,.0f} bits of reward at most, for "
            f"{num_parameters:,} trained parameters ({self.bits / max(1, num_parameters):.2g} bits each)"
        )

    def state_dict(self) -> dict[str, Any]:
        """The counts of the run, without its settings."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "patience"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the counts of an interrupted run."""
        for name, value in state.items():
            setattr(self, name, value)


def reward_bits(rewards: Tensor) -> float:
    """The most bits that rewards can have taught: their number times the entropy of their distribution.

    Args:
        rewards: The rewards, a tensor of any shape.

    References:
        *LoRA Without Regret*, 2025: an episode teaches a policy gradient at most the entropy of its advantage.
    """
    _, counts = torch.unique(rewards, return_counts=True)
    shares = counts.double() / counts.sum()
    return float(-(shares * shares.log2()).sum() * counts.sum())
