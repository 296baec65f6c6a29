"""What `FSDP2Strategy` does on two processes beside training; see `strategy_runs`.

Findings go to ``FOLDER/checks/NAME.pt``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import LoRAConfig, inject_lora, lora_state_dict
from lightning_lora.errors import ConfigError
from lightning_lora.lora.shards import reshard
from lightning_lora.sharding import FSDP2Strategy, parallelize_lora
from tests.integration.scripts import strategy_runs, two_processes
from tests.integration.scripts.strategy_runs import ADAPTERS, Toy, whole
from tests.support import toys

INSIDE_A_WINDOW = 4
"""Index of a micro-batch after which the second window holds two of its three."""


class Collectives(TorchDispatchMode):
    """Counts what is communicated, by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            # It communicates by operations on plain tensors, which come by here next.
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))

    def count(self, part: str) -> int:
        return sum(count for name, count in self.counts.items() if part in name)


class SaveInside(Callback):
    """A checkpoint inside an accumulation window."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if trainer.current_epoch == 0 and args[2] == INSIDE_A_WINDOW:
            trainer.save_checkpoint(self.path)


class StopInside(Callback):
    """Stops after the first micro-batch."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        trainer.should_stop = True


def trained(
    folder: Path,
    module: Any,
    strategy: ModelParallelStrategy,
    callbacks: Sequence[Callback] = (),
    ckpt_path: Path | None = None,
) -> Trainer:
    """A trainer that has fitted ``module`` for an epoch of four steps."""
    trainer = toys.trainer(
        folder,
        devices=2,
        strategy=strategy,
        use_distributed_sampler=False,
        accumulate_grad_batches=strategy_runs.WINDOW,
        callbacks=list(callbacks),
    )
    trainer.fit(module, strategy_runs.loader(2, trainer.global_rank), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def toy(**settings: Any) -> Toy:
    seed_everything(0, verbose=False)
    return Toy(replace(ADAPTERS, **settings))


def weights(module: LightningModule) -> dict[str, Any]:
    reshard(module)
    return {name: whole(parameter) for name, parameter in module.named_parameters() if parameter.requires_grad}


def keep(trainer: Trainer, folder: Path, name: str, **findings: Any) -> None:
    if trainer.is_global_zero:
        torch.save(findings, folder / "checks" / f"{name}.pt")


def saving(folder: Path) -> None:
    """How many tensors are gathered for one file, by Lightning's strategy and by ours."""
    module = toy()
    trainer = trained(folder, module, FSDP2Strategy())
    ours, theirs = Collectives(), Collectives()
    with ours:
        state = trainer.strategy.lightning_module_state_dict()
    with theirs:
        everything = ModelParallelStrategy.lightning_module_state_dict(trainer.strategy)  # pyright: ignore
    sharded = [parameter.requires_grad for parameter in module.parameters() if isinstance(parameter, DTensor)]
    keep(
        trainer,
        folder,
        "saving",
        gathered=(ours.count("gather"), theirs.count("gather")),
        sharded=(sum(sharded), len(sharded)),
        state=state,
        everything=everything,
        frozen=[name for name, parameter in module.named_parameters() if not parameter.requires_grad],
    )


def communication(folder: Path) -> None:
    """How often gradients are reduced in an epoch of ten micro-batches and four steps."""
    counts = {}
    for deferring in (None, False):
        with Collectives() as seen:
            trainer = trained(folder, toy(), FSDP2Strategy(defer_gradients=deferring))
        counts[deferring] = seen.count("reduce_scatter")
    keep(trainer, folder, "communication", counts=counts)


def inside(folder: Path) -> None:
    """A run that saves inside a window, one that goes on from there, and one that never saved."""
    path, first = folder / "inside.ckpt", toy()
    trained(folder, first, FSDP2Strategy(), [SaveInside(path)])
    resumed, plain = toy(), toy()
    trained(folder, resumed, FSDP2Strategy(), ckpt_path=path)
    trainer = trained(folder, plain, FSDP2Strategy())
    found = [weights(module) for module in (first, resumed, plain)]
    keep(trainer, folder, "inside", saved=found[0], resumed=found[1], plain=found[2], steps=len(resumed.losses))


def magnitudes(folder: Path) -> None:
    """A run with magnitudes that saves inside a window, and one that goes on from there."""
    path, saved, resumed = folder / "magnitudes.ckpt", toy(dora=True), toy(dora=True)
    trained(folder, saved, FSDP2Strategy(), [SaveInside(path)])
    trainer = trained(folder, resumed, FSDP2Strategy(), ckpt_path=path)
    sharded = sum(isinstance(p, DTensor) for name, p in resumed.named_parameters() if name.endswith("magnitude"))
    keep(trainer, folder, "magnitudes", saved=weights(saved), resumed=weights(resumed), sharded=sharded)


def again(folder: Path) -> None:
    """A module whose first run was stopped inside a window, and one that is new."""
    stopped, new = toy(), toy()
    trained(folder, stopped, FSDP2Strategy(), [StopInside()])
    assert not stopped.losses
    stopped.window = []
    trained(folder, stopped, FSDP2Strategy())
    trainer = trained(folder, new, FSDP2Strategy())
    keep(trainer, folder, "again", stopped=stopped.norms, new=new.norms)


class Whole(Toy):
    """Forgets to shard itself."""

    def configure_model(self) -> None:
        torch.manual_seed(1)


def unsharded(folder: Path) -> None:
    """What is said to a module that does not shard itself."""
    try:
        trained(folder, Whole(ADAPTERS), FSDP2Strategy())
    except ConfigError as error:
        if torch.distributed.get_rank() == 0:
            torch.save(str(error), folder / "checks" / "unsharded.pt")


def splitting(folder: Path) -> None:
    """What a tensor-parallel run writes, and what cannot be split."""
    module = strategy_runs.TASKS["llm-lora"](folder)
    trainer = toys.trainer(folder, devices=2, strategy=FSDP2Strategy(tensor_parallel_size=2), max_steps=2)
    trainer.fit(module, strategy_runs.loader(1, 0))
    module.save_adapter(folder / "split-adapter")
    trainer.save_checkpoint(folder / "split.ckpt")
    assert module.device_mesh is not None
    mesh = module.device_mesh["tensor_parallel"]
    plan, bent = {"*.up": "colwise", "*.down": "rowwise"}, {"*.up": "colwise_of_some_kind"}
    refused = {
        "plan": (ADAPTERS, bent),
        "no plan": (ADAPTERS, {}),
        "full": (ADAPTERS, plan),
        "all": (None, plan),
        "outside": (LoRAConfig(rank=1, targets=["up", "head"]), plan),
        "dropout": (LoRAConfig(rank=2, targets=["up", "down"], dropout=0.1), plan),
        "dora": (LoRAConfig(rank=2, targets=["up", "down"], dora=True), plan),
        "odd": (LoRAConfig(rank=1, targets=["head"]), plan | {"head": "colwise"}),
    }
    said = {name: refusal(mesh, *settings) for name, settings in refused.items()}
    keep(trainer, folder, "splitting", factors=lora_state_dict(module), said=said)


def refusal(mesh: DeviceMesh, lora: LoRAConfig | None, plan: dict[str, str]) -> str:
    net = two_processes.Blocks()
    if lora is not None:
        inject_lora(net, lora)
    try:
        parallelize_lora(net, mesh, plan)
    except ConfigError as error:
        return str(error)
    return ""


CHECKS: dict[str, Callable[[Path], None]] = {
    "saving": saving,
    "communication": communication,
    "inside": inside,
    "magnitudes": magnitudes,
    "again": again,
    "unsharded": unsharded,
    "splitting": splitting,
}
