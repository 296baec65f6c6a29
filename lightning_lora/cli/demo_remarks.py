"""What the numbers of the demo say: why LoRA is as fast, as small and as good as it is here, and what width changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_lora.cli.demo_arm import ArmResult
from lightning_lora.lora.layers.base import WeightShape

LARGE_WIDTH = 4096
"""Width of a model of 7 billion parameters."""
# float32: a gradient and two moments of Adam for every trained parameter.
_BYTES_OF_TRAINING = 12
# Differences below these are not worth an explanation.
_SAME_TIME, _SAME_LOSS = 0.05, 0.02


@dataclass(frozen=True)
class UpdateShare:
    """Multiplications of the updates, as a share of those of the weights they are added to.

    Args:
        rank: The rank of the updates.
        width: Width of the model, the dimension that most weights have in common.
        share: ``sum rank (in + out) / sum in out`` over the adapted weights.
    """

    rank: int
    width: int
    share: float

    @property
    def of_full(self) -> float:
        """Arithmetic of the adapted layers with LoRA, as a share of that with full fine-tuning.

        Forward, the gradient of the input and that of the weight cost one product each. LoRA leaves the last one out,
        and has all three for the update.
        """
        return (2 + 3 * self.share) / 3

    def at(self, width: int) -> UpdateShare:
        """The same rank in a model of another width and the same proportions."""
        return UpdateShare(self.rank, width, self.share * self.width / width)


def update_share(shapes: Mapping[str, WeightShape], ranks: Mapping[str, int]) -> UpdateShare:
    """The share of the updates of an adapter, all of one rank.

    Args:
        shapes: Adapted weight to its shape.
        ranks: Adapted weight to its rank.
    """
    added = sum(ranks[name] * (shape.num_in + shape.num_out) for name, shape in shapes.items())
    width = min(min(shape.num_in, shape.num_out) for shape in shapes.values())
    return UpdateShare(
        max(ranks.values()), width, added / sum(shape.num_in * shape.num_out for shape in shapes.values())
    )


def remarks(lora: ArmResult, full: ArmResult, update: UpdateShare) -> str:
    """Sentences on loss, time and memory of both runs, each from their numbers."""
    return "\n".join([_on_loss(lora, full, update), _on_time(lora, full, update), _on_memory(lora, full)])


def _on_loss(lora: ArmResult, full: ArmResult, update: UpdateShare) -> str:
    steps = max(lora.val_losses)
    behind = lora.val_losses[steps] - full.val_losses[steps]
    if abs(behind) < _SAME_LOSS:
        return f"loss: after {steps} steps both are equal within {_SAME_LOSS} nats."
    word, share = "behind" if behind > 0 else "ahead", lora.trainable / full.trainable
    said = (
        f"loss: after {steps} steps LoRA is {abs(behind):.2f} nats {word}, with {share:.0%} of the trained parameters"
    )
    if behind < 0:
        return f"{said}."
    return (
        f"{said}. This may be why: the base has seen no mathematics and has much to learn, and an update of rank "
        f"{update.rank} in width {update.width} can take up less of it at a time. This is one seed."
    )


def _on_time(lora: ArmResult, full: ArmResult, update: UpdateShare) -> str:
    ratio, large = lora.usual_step / full.usual_step, update.at(LARGE_WIDTH)
    word = "slower" if ratio > 1 + _SAME_TIME else "faster" if ratio < 1 - _SAME_TIME else "as fast"
    verdict = f"LoRA is {word}" + ("" if word == "as fast" else f" ({ratio:.2f} times the time of a step)")
    return (
        f"time: {verdict}. It saves the gradients of the weights, a third of the arithmetic, and adds updates of "
        f"{update.share:.0%} of it, as rank {update.rank} is {update.rank / update.width:.0%} of width {update.width}: "
        f"{update.of_full:.0%} of full fine-tuning in these layers, in three times as many, smaller products. In width "
        f"{LARGE_WIDTH:,} the updates add {large.share:.0%} and {large.of_full:.0%} remain."
    )


def _on_memory(lora: ArmResult, full: ArmResult) -> str:
    saved = _BYTES_OF_TRAINING * (full.trainable - lora.trainable) / 2**20
    grown = lora.peak_megabytes - lora.base_megabytes
    return (
        f"memory: gradients and Adam's moments take {_BYTES_OF_TRAINING} bytes a trained parameter, here {saved:.0f} "
        f"MB less with LoRA, beside {grown:.0f} MB of which most are activations. For 7 billion parameters they take "
        f"{_BYTES_OF_TRAINING * 7} GB, and LoRA decides whether the run fits."
    )
