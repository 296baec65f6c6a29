"""Rollouts come out of the training loader: with the weights of the moment, and from where a run has stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import HalfPrecision
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_lora import ConfigError, DataError
from lightning_lora.tasks.rl.rollout import Rollout, RolloutLoader, Unrounded, minibatch_orders
from tests.support.resuming import differences
from tests.tasks.rl import policies

pytestmark = policies.EXPECTED


class Ages(Callback):
    """The version of each rollout and the optimizer steps done, at its first minibatch."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int]] = []

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.found.append((batch["version"], trainer.global_step))


def test_every_rollout_is_sampled_with_the_weights_of_its_first_step(llama_folder: Path, tmp_path: Path) -> None:
    ages = Ages()
    policies.fit(policies.make(llama_folder), tmp_path, max_steps=20, callbacks=[ages])
    assert ages.found == [(step, step) for step in range(20)]


def test_without_a_length_lightning_would_sample_a_step_too_early(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above guards against."""
    monkeypatch.delattr(RolloutLoader, "__len__")
    ages = Ages()
    policies.fit(policies.make(llama_folder, minibatches=2), tmp_path, max_steps=4, callbacks=[ages])
    assert any(version != step for version, step in ages.found)


def test_minibatches_and_epochs_of_a_rollout_are_steps_of_one_version(llama_folder: Path, tmp_path: Path) -> None:
    ages, module = Ages(), policies.make(llama_folder, minibatches=2, epochs=2, loss="clip")
    runner = policies.fit(module, tmp_path, callbacks=[ages], loader=policies.prompt_loader(4, batch_size=2))
    assert runner.num_training_batches == 2 * 2 * 2
    assert ages.found == [(4 * (step // 4), step) for step in range(8)]


def test_minibatches_of_an_epoch_hold_every_prompt_once_and_whole_groups() -> None:
    orders = minibatch_orders(5, 2, 3, torch.Generator().manual_seed(0))
    assert [len(prompts) for prompts in orders] == [3, 2] * 3
    for epoch in range(3):
        assert sorted(torch.cat(orders[2 * epoch : 2 * epoch + 2]).tolist()) == list(range(5))
    rows = torch.arange(10)[:, None].expand(10, 4)
    rollout = Rollout({"input_ids": rows}, torch.tensor([4, 2] * 5), {"advantages": rows.float()}, 2, 0, orders)
    batch = rollout.minibatch(1)
    assert batch["input_ids"][:, 0].tolist() == [row for p in orders[1].tolist() for row in (2 * p, 2 * p + 1)]
    assert batch["attention_mask"].sum(1).tolist() == [4, 2, 4, 2]
    # Monitors count the first dimension of the first tensor: prompts, which are what is independent.
    assert next(iter(batch.values())).tolist() == orders[1].tolist()


def test_floats_of_a_batch_are_not_rounded_by_low_precision() -> None:
    exact = torch.tensor([0.1234567])
    batch = HalfPrecision("bf16-true").convert_input({"numbers": Unrounded(x=exact), "plain": exact})
    assert batch["plain"].dtype is torch.bfloat16
    assert torch.equal(batch["numbers"]["x"], exact)


def test_too_few_prompts_and_streams_of_prompts_are_refused(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"minibatches=3 of a rollout need as many prompts, .* holds 2"):
        policies.fit(policies.make(llama_folder, minibatches=3), tmp_path)

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from policies.prompt_loader().dataset  # type: ignore[misc]

    stream = DataLoader(Stream(), batch_size=2, collate_fn=policies.collate)
    with pytest.raises(ConfigError, match="a policy needs prompts from a DataLoader over rows with numbers"):
        policies.fit(policies.make(llama_folder), tmp_path, loader=stream)


class Save(Callback):
    """Saves a checkpoint after each batch."""

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / f"{trainer.current_epoch}-{batch_idx + 1}.ckpt")


SETTINGS: dict[str, dict[str, Any]] = {
    "clip": {"minibatches": 2, "epochs": 2, "loss": "clip", "kl_coefficient": 0.1},
    "values": {"minibatches": 2, "epochs": 1, "advantage": "gae", "kl": "k1", "kl_coefficient": 0.1},
}


def end(folder: Path, name: str, where: Path, ckpt_path: Path | None = None, seed: int = 0, **options: Any) -> Any:
    """The last checkpoint of a run of two epochs."""
    torch.manual_seed(seed)
    callbacks = [] if ckpt_path else [Save()]
    loader = policies.prompt_loader(4 if name == "clip" else 6)
    options = {"callbacks": callbacks, "loader": loader, "max_epochs": 2, "ckpt_path": ckpt_path} | options
    runner = policies.fit(policies.make(folder, **SETTINGS[name]), where, **options)
    runner.save_checkpoint(where / "end.ckpt")
    return torch.load(where / "end.ckpt", weights_only=True)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_goes_on_bit_by_bit_inside_a_rollout_and_between_two(
    name: str, llama_folder: Path, tmp_path: Path
) -> None:
    whole = end(llama_folder, name, tmp_path)
    # In the middle of a rollout of the second epoch, after its last minibatch, and at the end of the first epoch.
    inside, after = ("1-3", "1-4") if name == "clip" else ("1-3", "1-2")
    for place in (inside, after, "0-8" if name == "clip" else "0-6"):
        resumed = end(llama_folder, name, tmp_path, tmp_path / f"{place}.ckpt", seed=7)
        assert not differences(whole, resumed)[:3], place


def test_an_open_accumulation_window_inside_a_rollout_goes_on(llama_folder: Path, tmp_path: Path) -> None:
    whole = end(llama_folder, "clip", tmp_path, accumulate_grad_batches=3)
    resumed = end(llama_folder, "clip", tmp_path, tmp_path / "1-4.ckpt", seed=7, accumulate_grad_batches=3)
    assert not differences(whole, resumed)[:3]


def test_a_checkpoint_inside_a_rollout_is_not_read_by_other_minibatches(llama_folder: Path, tmp_path: Path) -> None:
    end(llama_folder, "clip", tmp_path)
    module = policies.make(llama_folder, minibatches=1)
    with pytest.raises(DataError, match="after 3 of its 4 minibatches on 1 ranks, and this run has 1 ranks and 1"):
        policies.fit(module, tmp_path, max_epochs=2, ckpt_path=tmp_path / "1-3.ckpt")
