"""Ranks grow while a run trains: nothing else changes, and every file of the run can be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException

from lightning_lora import LoRAConfig, load_adapter, save_adapter
from lightning_lora.callbacks import AdapterEMA, BatchSizeMonitor, FiniteGradients, LoRA, LoRAGuard, RankGrowth
from lightning_lora.errors import AdapterFileError, ConfigError
from lightning_lora.lora.layers.adapted import adapted_weights
from lightning_lora.mixin.lora_mixin import LoRAMixin
from tests.support import resuming, toys

pytestmark = [*toys.expected_warnings, *toys.monitor_warnings]


class Wide(toys.Plain):
    """Two wide layers, so that there is room to grow."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)


class WideLoRA(LoRAMixin, Wide):
    lora = LoRAConfig(rank=1, alpha=2)


class Dicey(resuming.DiceyLoRA):
    """Random numbers, dropout and two schedulers, and layers with room to grow."""

    def __init__(self) -> None:
        super().__init__()
        self.net = toys.Net(width=16)
        self.lora = LoRAConfig(rank=1, alpha=2, dropout=0.2)


class Around(Callback):
    """Records outputs at the end of each batch, and at the start of the next one, after everything else."""

    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.after.append(computed(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.before.append(computed(pl_module))


def computed(module: LightningModule) -> Tensor:
    with torch.no_grad():
        return module(toys.rows(8).tensors[0])


def ranks(module: nn.Module) -> dict[str, int]:
    return {name: layer.lora_specs[weight].rank for name, (layer, weight) in adapted_weights(module).items()}


def grow_often(**options: Any) -> RankGrowth:
    return RankGrowth(**({"every_n_steps": 2, "threshold": 0.01, "budget": 10_000} | options))


def test_growth_changes_no_output_and_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, around, growth = WideLoRA(), Around(), RankGrowth()
    guards = [LoRAGuard(patience=2), FiniteGradients()]
    toys.fit(module, tmp_path, max_epochs=5, callbacks=[growth, around, *guards])
    largest = [float((b - a).abs().max()) for b, a in zip(around.before, around.after[1:], strict=False)]
    assert max(largest) <= 1e-6
    assert growth.growths, "without arguments something has grown"
    assert max(g["step"] for g in growth.growths) <= 10
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in e.items() if k not in ("event", "time")} for e in events] == growth.growths
    for told in growth.growths:
        assert all(told["after"][name] == 2 * told["before"][name] for name in told["after"])
        assert told["parameters"] <= told["budget"]
    assert max(ranks(module).values()) <= 4
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == growth.growths[-1]["parameters"]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_goes_on_exactly_before_and_after_growth(tmp_path: Path, accumulate: int) -> None:
    growths: list[RankGrowth] = []

    def run(folder: Path, ckpt: Path | None = None) -> resuming.Outcome:
        growths.append(grow_often(max_rank=4))
        return resuming.run(
            Dicey, folder, ckpt, callbacks=[growths[-1], AdapterEMA(0.6)], accumulate_grad_batches=accumulate
        )

    whole = run(tmp_path)
    steps = {growth["step"] for growth in growths[0].growths}
    assert len(steps) > 1
    for place in ("batch-0-2", "batch-0-4", "batch-1-3", "epoch-1", "batch-2-1"):
        found = resuming.unlike(whole, run(tmp_path, tmp_path / f"{place}.ckpt"))
        assert not found, f"{place}: {found[:5]}"
        assert growths[-1].growths == growths[0].growths


def optimizers() -> dict[str, Callable[[Any], torch.optim.Optimizer]]:
    return {
        "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
        "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        "foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
        "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.001),
        "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    }


@pytest.mark.parametrize("name", optimizers())
def test_optimizer_state_of_the_old_part_stays_and_the_new_part_moves_no_faster(tmp_path: Path, name: str) -> None:
    module = WideLoRA()
    module.configure_optimizers = lambda: optimizers()[name]([p for p in module.parameters() if p.requires_grad])  # type: ignore[method-assign]
    states: list[dict[str, dict[str, Any]]] = []

    class Look(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            self.copy(trainer, pl_module)

        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            self.copy(trainer, pl_module)

        def copy(self, trainer: Trainer, module: LightningModule) -> None:
            state = trainer.optimizers[0].state
            states.append(
                {
                    n: {k: torch.as_tensor(v).clone() for k, v in state[p].items() if v is not None}
                    | {"weight": p.detach().clone()}
                    for n, p in module.named_parameters()
                    if p in state
                }
            )

    toys.fit(module, tmp_path, max_epochs=2, callbacks=[grow_often(every_n_steps=3), Look()])
    before, after, stepped = states[5], states[6], states[7]
    grown = [n for n in before if before[n]["weight"].shape != after[n]["weight"].shape]
    assert grown
    for parameter in grown:
        corner = tuple(slice(0, length) for length in before[parameter]["weight"].shape)
        for key, value in before[parameter].items():
            now = after[parameter][key]
            assert torch.equal(now[corner] if value.dim() else now, value), f"{parameter} {key}"
        move = (stepped[parameter]["weight"] - after[parameter]["weight"]).abs()
        if name in ("AdamW", "fused", "foreach") and parameter.endswith("lora_B"):
            new = move.clone()
            new[corner] = 0
            assert 0 < float(new.max()) <= 0.01


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used:UserWarning")
def test_a_checkpoint_brings_its_ranks_and_an_earlier_one_takes_them_back(tmp_path: Path) -> None:
    module = WideLoRA()
    trainer = toys.trainer(tmp_path, max_epochs=2, callbacks=[grow_often(every_n_steps=5)])
    trainer.fit(module, toys.loader())
    trainer.save_checkpoint(tmp_path / "grown.ckpt")
    expected, grown = computed(module), ranks(module)
    assert set(grown.values()) != {1}
    loaded = WideLoRA.load_from_checkpoint(tmp_path / "grown.ckpt", map_location="cpu")
    assert ranks(loaded) == grown
    assert torch.equal(computed(loaded), expected)
    fresh = WideLoRA()
    toys.trainer(tmp_path).validate(fresh, toys.loader(), ckpt_path=tmp_path / "grown.ckpt", weights_only=True)
    assert torch.equal(computed(fresh), expected)
    start = WideLoRA()
    early = toys.trainer(tmp_path)
    early.fit(start, toys.loader())
    early.save_checkpoint(tmp_path / "early.ckpt")
    small = computed(start)
    toys.trainer(tmp_path).test(fresh, toys.loader(), ckpt_path=tmp_path / "early.ckpt", weights_only=True)
    assert set(ranks(fresh).values()) == {1}
    assert torch.equal(computed(fresh), small)


def test_a_checkpoint_of_other_settings_is_refused_as_before(tmp_path: Path) -> None:
    module = WideLoRA()
    trainer = toys.trainer(tmp_path, max_epochs=2, callbacks=[grow_often()])
    trainer.fit(module, toys.loader())
    trainer.save_checkpoint(tmp_path / "grown.ckpt")
    with pytest.raises(AdapterFileError, match="rank 1 -> 2"):
        WideLoRA.load_from_checkpoint(tmp_path / "grown.ckpt", lora=LoRAConfig(rank=2, alpha=2), map_location="cpu")


def test_folders_of_a_grown_adapter_have_its_ranks_and_merge(tmp_path: Path) -> None:
    module = WideLoRA()
    toys.fit(module, tmp_path, max_epochs=2, callbacks=[grow_often(max_rank=3)])
    expected = computed(module)
    save_adapter(module, tmp_path / "adapter")
    again = Wide()
    load_adapter(again, tmp_path / "adapter")
    assert ranks(again) == ranks(module)
    assert torch.allclose(computed(again), expected, atol=1e-6)
    module.merge_lora()
    assert torch.allclose(computed(module), expected, atol=1e-5)


def test_a_plain_module_adapted_by_the_callback_grows_in_either_order(tmp_path: Path) -> None:
    for order in (1, -1):
        growth = grow_often()
        callbacks = [growth, BatchSizeMonitor(every_n_steps=1)][::order]
        callbacks[0:0] = [LoRA(LoRAConfig(rank=1))]
        for callback in callbacks:
            if isinstance(callback, BatchSizeMonitor):
                callback.warmup_steps = 0
        toys.fit(Wide(), tmp_path / str(order), max_epochs=2, callbacks=callbacks, accumulate_grad_batches=2)
        assert growth.growths


def test_a_threshold_of_one_and_a_small_budget_stop_growth(tmp_path: Path) -> None:
    module, growth = WideLoRA(), grow_often(budget=80)
    toys.fit(module, tmp_path, max_epochs=2, callbacks=[growth])
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) <= 80
    calm = grow_often(threshold=1.0, max_rank=4)
    toys.fit(module := WideLoRA(), tmp_path, max_epochs=2, callbacks=[calm])
    # An update of rank one uses all of its rank; the second half of a new one is not yet used in full.
    assert max(ranks(module).values()) == 2


class Manual(toys.ByHand, WideLoRA):
    pass


class Full(WideLoRA):
    lora = None


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (WideLoRA, {"strategy": FSDPStrategy()}, "cannot change the shapes that FSDPStrategy"),
        (WideLoRA, {"strategy": ModelParallelStrategy()}, "cannot change the shapes that ModelParallelStrategy"),
        (WideLoRA, {"strategy": "ddp_fork"}, "use strategy='ddp'"),
        (WideLoRA, {"callbacks": [EMAWeightAveraging()]}, "use AdapterEMA"),
        (WideLoRA, {"growth": RankGrowth(budget=5)}, "budget is 5 adapter parameters, fewer than the 70"),
        (Manual, {}, "automatic optimization"),
        (Full, {}, "no adapters to grow"),
    ],
)
def test_a_run_in_which_ranks_cannot_change_is_refused_at_its_start(
    tmp_path: Path, make: type[LightningModule], options: dict[str, Any], text: str
) -> None:
    growth, strategy = options.get("growth", RankGrowth()), options.get("strategy", "auto")
    if not isinstance(strategy, str):  # they need a GPU, or processes
        with pytest.raises(ConfigError, match=text):
            growth.setup(SimpleNamespace(strategy=strategy), make(), "fit")  # type: ignore[arg-type]
        return
    trainer = toys.trainer(tmp_path, callbacks=[growth, *options.get("callbacks", [])], strategy=strategy)
    # A child process reports by an error of its own, with the text.
    with pytest.raises(ConfigError if strategy == "auto" else ProcessRaisedException, match=text):
        trainer.fit(make(), toys.loader())


@pytest.mark.parametrize(
    "options", [{"max_rank": 0}, {"budget": 1.5}, {"every_n_steps": True}, {"threshold": 0}, {"threshold": 1.5}]
)
def test_a_number_out_of_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        RankGrowth(**options)
