"""A reference that is a frozen copy stays what it was, whatever happens to the adapter of the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora import LoRAConfig, lora_layers
from lightning_lora.callbacks import RankGrowth
from lightning_lora.tasks import DPO, PolicyGradient
from tests.support import tiny_models, toys
from tests.tasks.rl import pairs
from tests.tasks.rl.test_dpo import by_hand

pytestmark = toys.expected_warnings


def make(folder: str, **lora: Any) -> DPO:
    """A policy whose adapter has learned something before, as has a norm that is trained in full."""
    module = DPO(folder, 1e-2, LoRAConfig(rank=2, trainable=["norm"], **lora), beta=0.5)
    module.configure_model()
    tiny_models.wake(module, size=0.3)
    return module


SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch
from torch import distributed as dist
from torch.utils.data import DataLoader
from lightning_lora.lora.shards import full_tensor, reshard
from lightning_lora.sharding import FSDP2Strategy
from tests.support import toys
from tests.tasks.rl import pairs, policies, test_frozen_reference, test_policy_ranks

kind, folder, llama, ranks = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
# Every step has the same pairs or prompts, however many ranks they are on.
if kind == "pairs":
    make = lambda: test_frozen_reference.Loaded(llama, beta=0.5)
    rank = int(__import__("os").environ.get("RANK", 0))
    loader = DataLoader([pairs.pair(number) for number in range(rank, 8, ranks)], 4 // ranks)
else:
    settings = dict(reward=policies.count_letters, reward_workers=0, group_size=2, max_new_tokens=4, epochs=2)
    settings |= dict(lora=test_frozen_reference.LORA, kl_coefficient=0.5)
    make = lambda: test_frozen_reference.LoadedPolicy(llama, sampler=test_policy_ranks.OfPrompt(), **settings)
    loader = policies.prompt_loader(4, 4 // ranks)

def fit(max_epochs, ckpt_path=None):
    strategy = "auto" if ranks == 1 else FSDP2Strategy()
    trainer = toys.trainer(
        folder, max_epochs=max_epochs, devices=ranks, strategy=strategy, use_distributed_sampler=kind != "pairs"
    )
    trainer.fit(module := make(), loader, ckpt_path=ckpt_path, weights_only=True)
    return module, trainer

file = folder / f"{kind}-{ranks}.ckpt"
fit(1)[1].save_checkpoint(file)
again, trainer = fit(2, file)
reshard(again)
found = {name: full_tensor(p.detach()) for name, p in again.named_parameters() if p.requires_grad}
frozen = {name: full_tensor(tensor) for name, tensor in again.reference._frozen.items()}
if trainer.global_rank == 0:
    torch.save({"trained": found, "frozen": frozen}, folder / f"{kind}-{ranks}.pt")
if dist.is_initialized():
    dist.destroy_process_group()
"""
LORA = LoRAConfig(rank=2, trainable=["norm"], adapt_head=True)


class Awake:
    """A task whose adapter has learned something before, as has a norm that is trained in full."""

    def _model_is_whole(self) -> None:
        super()._model_is_whole()  # pyright: ignore[reportAttributeAccessIssue]
        tiny_models.wake(self.model, size=0.3)  # pyright: ignore[reportAttributeAccessIssue]

    def configure_optimizers(self) -> Any:
        """Adam would turn the rounding of small gradients into whole steps."""
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 3e-4, 0.5)  # pyright: ignore


class Loaded(Awake, DPO):
    """On pairs."""

    def __init__(self, model: str, **settings: Any) -> None:
        super().__init__(model, 1e-2, LORA, **settings)


class LoadedPolicy(Awake, PolicyGradient):
    """On prompts."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pairs", "prompts"])
def test_two_ranks_with_shards_train_and_go_on_as_one_process(kind: str, tmp_path: Path, llama_folder: Path) -> None:
    llama = pairs.folder_of_llama(tmp_path) if kind == "pairs" else str(llama_folder)
    for ranks in (1, 2):
        toys.run_python(SCRIPT, kind, tmp_path, llama, ranks, ranks=ranks)
    one, two = (torch.load(tmp_path / f"{kind}-{ranks}.pt", weights_only=True) for ranks in (1, 2))
    assert one["frozen"].keys() == two["frozen"].keys()
    for name, start in one["frozen"].items():
        assert torch.equal(two["frozen"][name], start)
        change, other = (run["trained"][f"model.{name}"] - start for run in (one, two))
        assert change.any()
        assert (change - other).norm() <= 0.02 * change.norm(), name


def growth(**options: Any) -> RankGrowth:
    return RankGrowth(**({"max_rank": 4, "budget": 100_000, "every_n_steps": 1, "threshold": 0.001} | options))


@pytest.mark.parametrize("lora", [{}, {"dora": True}, {"scaling": "rslora"}, {"init": "pissa"}], ids=str)
def test_a_reference_does_not_grow_with_its_policy(lora: dict[str, Any], tmp_path: Path) -> None:
    folder = pairs.folder_of_llama(tmp_path)
    module, batch = make(folder, **lora), next(iter(pairs.loader()))
    with torch.no_grad():
        reference = by_hand(module.model, batch)
    runner = pairs.fit(module, tmp_path, pairs.loader(), callbacks=[growth()])
    _assert_compares(module, batch, reference)
    runner.save_checkpoint(tmp_path / "grown.ckpt")
    resumed = make(folder, **lora)
    pairs.fit(resumed, tmp_path, pairs.loader(), max_epochs=2, callbacks=[growth()], ckpt_path=tmp_path / "grown.ckpt")
    _assert_compares(resumed, batch, reference)


def _assert_compares(module: DPO, batch: dict[str, Tensor], reference: Tensor) -> None:
    assert module.reference.kind == "frozen"
    assert {layer.lora_spec.rank for layer in lora_layers(module).values()} == {4}
    before = toys.snapshot(module)
    with torch.no_grad():
        policy = by_hand(module.model, batch)
        rewards = module.score(batch).rewards
    assert (policy - reference).abs().max() > 0.01
    torch.testing.assert_close(rewards, 0.5 * (policy - reference), rtol=1e-4, atol=1e-4)
    assert toys.same(before, toys.snapshot(module))
