"""What the demo says of its own result: each sentence follows from the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_lora.cli.demo import next_commands
from lightning_lora.cli.demo_arm import ArmResult
from lightning_lora.cli.demo_remarks import UpdateShare, remarks, update_share
from lightning_lora.lora.layers.base import WeightShape

# The attention and MLP of one block of width 160.
SHAPES = {"q": WeightShape(160, 160), "up": WeightShape(160, 432), "down": WeightShape(432, 160)}
UPDATE = UpdateShare(rank=32, width=160, share=0.3)


def arm(loss: float = 2.5, trainable: int = 1_000_000, seconds: float = 10.0) -> ArmResult:
    return ArmResult("an arm", 1e-3, (4.0, loss), {0: 4.7, 2: loss}, trainable, (seconds, 100.0, seconds), 400.0, 900.0)


def test_the_share_of_an_update_is_that_of_its_multiplications() -> None:
    update = update_share(SHAPES, dict.fromkeys(SHAPES, 32))
    assert (update.rank, update.width) == (32, 160)
    assert update.share == pytest.approx(32 * (320 + 2 * 592) / (160 * 160 + 2 * 160 * 432))
    # Forward and input gradient of the weight, and three products of the update, of three products of full fine-tuning.
    assert update.of_full == pytest.approx((2 + 3 * update.share) / 3)
    wide = update_share(
        {name: WeightShape(s.num_in * 8, s.num_out * 8) for name, s in SHAPES.items()}, dict.fromkeys(SHAPES, 32)
    )
    assert update.at(160 * 8).share == pytest.approx(wide.share)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (13.0, "LoRA is slower (1.30 times the time of a step)"),
        (7.0, "LoRA is faster (0.70 times the time of a step)"),
        (10.2, "LoRA is as fast. "),
    ],
)
def test_time_of_a_step_is_explained_as_it_was_and_one_that_stalled_does_not_count(seconds: float, words: str) -> None:
    said = remarks(arm(seconds=seconds), arm(), UPDATE)
    assert words in said
    assert "adds updates of 30% of it, as rank 32 is 20% of width 160: 97% of full" in said
    assert "In width 4,096 the updates add 1% and 68% remain" in said


@pytest.mark.parametrize(
    ("loss", "words"), [(2.75, "0.25 nats behind"), (2.3, "0.20 nats ahead"), (2.51, "equal within 0.02 nats")]
)
def test_loss_is_explained_as_it_was(loss: float, words: str) -> None:
    assert words in remarks(arm(loss=loss), arm(), UPDATE)


def test_memory_counts_gradients_and_moments() -> None:
    said = remarks(arm(trainable=2**20), arm(trainable=3 * 2**20), UPDATE)
    assert "here 24 MB less with LoRA, beside 500 MB" in said


def test_the_next_commands_can_be_pasted(tmp_path: Path) -> None:
    lines = next_commands(tmp_path / "my demo").splitlines()
    assert [line.split()[1] for line in lines] == ["generate", "generate", "inspect"]
    assert all(f"'{tmp_path}/my demo/" in line for line in lines)
