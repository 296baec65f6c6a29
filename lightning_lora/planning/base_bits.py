"""The bits that the base model itself needs to write the training targets: how much of them it does not know yet."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora.data.batches.collate import Collate
from lightning_lora.data.sft import SFTDataModule
from lightning_lora.errors import ConfigError, PlanError, check_count
from lightning_lora.lightning_messages import messages_from
from lightning_lora.lora.adapter import disable_lora
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.memory.building import built_without_memory
from lightning_lora.memory.step_trace import weight_tensors
from lightning_lora.mixin.lora_mixin import LoRAMixin
from lightning_lora.planning.count_data import unique_rows
from lightning_lora.planning.devices import find_devices
from lightning_lora.planning.label_counts import count_labels, epoch_rows
from lightning_lora.planning.set_up_data import quiet_trainer, set_up
from lightning_lora.planning.stop_signals import ending_at_once
from lightning_lora.planning.timing.rounds import Rounds
from lightning_lora.tasks.pretrained import PretrainedTask

ROWS, TOKENS = 2048, 2_000_000
"""Rows and tokens of a sample, whichever is reached first."""
SECONDS = 60.0
"""Most seconds that the model runs."""
_RESAMPLES = 2000


@dataclass(frozen=True)
class BaseBits:
    """Bits of the unique targets for the base model, from a random sample of rows.

    Args:
        bits: Estimated bits of all unique rows.
        low: Lower end of the 95 % interval; ``bits`` itself if all unique rows were measured.
        high: Upper end.
        rows: Rows of the sample.
        tokens: Supervised tokens of the sample; rows if targets are no tokens.
    """

    bits: float
    low: float
    high: float
    rows: int
    tokens: int


@dataclass(frozen=True)
class _Sample:
    """Rows to measure, and what they stand for: ``units`` of all unique rows, of which there are ``num_rows``."""

    batches: Rounds
    units: int
    num_rows: int


def measure_base_bits(
    module: LightningModule,
    datamodule: LightningDataModule,
    rows: int = ROWS,
    tokens: int = TOKENS,
    seed: int = 0,
    precision: Any = "32-true",
    seconds: float = SECONDS,
) -> BaseBits:
    r"""Measure ``sum -log2 p_base`` over the supervised tokens of a random sample of rows, scaled to all unique rows.

    The rows are read as training reads them, template and masks included: with a template that the base does not know,
    the number is too high. It bounds from above what adapters must store to repeat the data word for word. The module,
    the data module and the random state stay as they are; the weights are loaded into a copy, on a device at hand.
    Where a row takes long, fewer are read, as many as fit into ``seconds``, and the interval is wider.

    A module that is no `CausalLM` needs a ``predict_step`` that returns a mapping with the ``loss`` of each row in
    nats, ``(rows,)``; with ``tokens`` beside it, ``(rows,)``, the loss is the mean over these.

    Args:
        module: The module that would be trained; its adapters, if any, are off.
        datamodule: Its data.
        rows: Most rows of the sample, at least 2.
        tokens: Most tokens of the sample, prompts included.
        seed: Seeds the choice of the rows, and the interval.
        precision: Precision of the Trainer.
        seconds: Most seconds that the model runs, without loading it; two rows are always read.

    Raises:
        ConfigError: If rows give no loss in nats, the data are a stream, or the base does not fit into memory here.
        DataError: If a row cannot be used, or no row has a target.
    """
    check_count("rows", rows, PlanError, least=2)
    check_count("tokens", tokens, PlanError)
    if not seconds > 0:
        raise PlanError(f"seconds must be more than 0, got {seconds!r}.")
    _check_gives_losses(module)
    _check_fits(module, precision)
    generator = numpy.random.default_rng(seed)
    with set_up(datamodule, module) as data:
        if isinstance(data, SFTDataModule):
            sample = _token_sample(data, rows, tokens, seconds, generator)
        else:
            sample = _row_sample(data.train_dataloader(), rows, seconds, generator)
        nats, weights = _row_nats(module, sample, precision)
    if not numpy.isfinite(nats).all():
        raise PlanError(f"{type(module).__name__} gives no finite loss for {(~numpy.isfinite(nats)).sum()} rows.")
    _warn_if_worse_than_chance(module, nats.sum() / weights.sum() / math.log(2))
    return _scaled(nats / math.log(2), weights, sample, generator)


def _token_sample(
    data: SFTDataModule, rows: int, tokens: int, seconds: float, generator: numpy.random.Generator
) -> _Sample:
    if data.stream is not None:
        raise PlanError("the bits of a stream cannot be measured: set streaming: false, with max_rows if need be.")
    unique = unique_rows(data)
    chosen = generator.permutation(len(unique.numbers))[:rows]
    few = numpy.cumsum(unique.lengths[chosen]) <= tokens
    few[:2] = True
    chosen = chosen[few]
    collate = data._collate(Collate, "train")
    rounds = Rounds(data._examples("train"), unique.numbers[chosen], unique.lengths[chosen], collate, seconds)
    return _Sample(rounds, int(unique.supervised_tokens.sum()), len(unique.numbers))


def _row_sample(loader: Any, rows: int, seconds: float, generator: numpy.random.Generator) -> _Sample:
    counts = count_labels(loader)
    if counts.unit == "unknown" or counts.rows is None or not isinstance(loader, DataLoader):
        raise PlanError(
            "bits can be measured for tokens and classes only: nothing tells the targets of these data, or they are no "
            "integers (the error of a regression is no number of bits)."
        )
    chosen = generator.permutation(epoch_rows(loader))[:rows]
    unique = counts.rows - (counts.duplicate_rows or 0)
    return _Sample(Rounds(loader.dataset, chosen, None, loader.collate_fn, seconds), unique, unique)


def _row_nats(module: LightningModule, sample: _Sample, precision: Any) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Nats and supervised tokens of each row; 1 for each row if targets are no tokens."""
    twin = copy.deepcopy(module)
    if isinstance(twin, LoRAMixin) and not lora_layers(twin):
        # A fresh adapter would only take time. But on a CPU, bitsandbytes fails in eval mode on widths that are no
        # multiple of 64, where adapted layers compute by themselves.
        twin.lora = LoRAConfig(rank=1) if _is_quantised(twin) else None
    trainer = quiet_trainer(precision=precision)
    with messages_from(logging.WARNING), ending_at_once(), disable_lora(twin) if lora_layers(twin) else nullcontext():
        predicted = trainer.predict(twin, sample.batches) or []
    pairs = [_losses(module, each) for each in predicted]
    losses, weights = (numpy.concatenate(part) for part in zip(*pairs, strict=True))
    return losses * weights, weights


def _is_quantised(module: LoRAMixin) -> bool:
    stored = getattr(getattr(module, "model_config", None), "quantization_config", None)
    return stored is not None or getattr(module, "quantization", None) is not None


def _losses(module: LightningModule, predicted: Any) -> tuple[numpy.ndarray, numpy.ndarray]:
    loss = predicted.get("loss") if isinstance(predicted, Mapping) else None
    if not isinstance(loss, Tensor):
        raise _no_losses(module)
    losses, tokens = loss.detach().double().cpu().reshape(-1).numpy(), predicted.get("tokens")
    return losses, numpy.ones_like(losses) if tokens is None else tokens.detach().double().cpu().reshape(-1).numpy()


def _check_gives_losses(module: LightningModule) -> None:
    if isinstance(module, PretrainedTask) and module.new_head:
        raise PlanError(
            f"the head of {type(module).__name__} is new, so its base knows nothing of the labels: their bits are "
            f"those of the counted labels, and there is nothing to measure."
        )
    if type(module).predict_step is LightningModule.predict_step:
        raise _no_losses(module)


def _check_fits(module: LightningModule, precision: Any) -> None:
    """Refuse a base that is larger than the memory here, before it is read."""
    here = find_devices()
    with built_without_memory(module, precision=precision) as built:
        size = sum(tensor.nbytes for tensor in weight_tensors(built))
    if size > here.memory:
        raise PlanError(
            f"the bits of the base are measured by running it here, and its weights ({size / 2**30:,.1f} GiB) are more "
            f"than the memory of {here}: leave out measure, or plan on a machine that holds the base."
        )


def _no_losses(module: LightningModule) -> ConfigError:
    return PlanError(
        f"the bits of the base are measured by the loss of single rows: {type(module).__name__}.predict_step must "
        f'return a mapping with the "loss" of each row in nats, a tensor of shape (rows,).'
    )


def _warn_if_worse_than_chance(module: LightningModule, bits: float) -> None:
    size = getattr(module, "vocab_size", None)
    if isinstance(size, int) and bits > 1.01 * math.log2(size):
        rank_zero_warn(
            f"the base needs {bits:.2f} bits for a trained token, more than the {math.log2(size):.2f} of a uniform "
            f"guess among its {size:,} tokens: check that tokenizer and chat template belong to this model."
        )


def _scaled(
    bits: numpy.ndarray, weights: numpy.ndarray, sample: _Sample, generator: numpy.random.Generator
) -> BaseBits:
    """The total over all unique rows, as a ratio of sums, with a bootstrap interval over rows."""
    num_rows = len(bits)
    total = sample.units * bits.sum() / weights.sum()
    draws = generator.multinomial(num_rows, numpy.full(num_rows, 1 / num_rows), size=_RESAMPLES)
    again = sample.units * (draws @ bits) / (draws @ weights)
    # Drawn without replacement from a finite number of rows: nothing is left uncertain once all are measured.
    shrink = math.sqrt(max(0.0, 1 - num_rows / sample.num_rows))
    low, high = (total + shrink * (float(numpy.quantile(again, share)) - total) for share in (0.025, 0.975))
    return BaseBits(float(total), float(low), float(high), num_rows, int(weights.sum()))
