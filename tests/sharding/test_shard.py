"""The repeated blocks of a module, which become one FSDP group each."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_lora.errors import ConfigError
from lightning_lora.sharding.shard import repeated_blocks


class Block(nn.Module):
    """A block that itself holds a list of like modules."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2, 2)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.mixed = nn.ModuleList([nn.Linear(2, 2), nn.Tanh()])
        self.single = nn.ModuleList([Block()])


def test_blocks_are_the_members_of_outermost_lists_of_one_type() -> None:
    module = Stack()
    outermost = [*module.blocks, *module.single[0].experts]  # pyright: ignore[reportGeneralTypeIssues]
    assert repeated_blocks(module) == outermost
    assert repeated_blocks(nn.Linear(2, 2)) == []


def test_blocks_of_given_types_are_found_wherever_they_are() -> None:
    module = Stack()
    assert repeated_blocks(module, [Block]) == [*module.blocks, *module.single]


def test_types_that_do_not_occur_are_refused() -> None:
    with pytest.raises(ConfigError, match="Stack holds no Conv1d, LSTM: give block_types that occur in it, or None"):
        repeated_blocks(Stack(), [nn.Conv1d, nn.LSTM])
