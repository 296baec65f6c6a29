"""Magnitudes in a run: trained at the adapters' rate, saved, resumed and averaged as the factors are."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_lora import (
    AdapterFileError,
    ConfigError,
    LoRAConfig,
    inject_lora,
    load_adapter,
    lora_layers,
    lora_state_dict,
)
from lightning_lora.callbacks import (
    AdapterCheckpoint,
    AdapterEMA,
    CheckpointGuard,
    FiniteGradients,
    LoRA,
    LoRAGuard,
    MergeOnFitEnd,
    RankGrowth,
)
from lightning_lora.cli import main as cli
from lightning_lora.lora.layers.base import MAGNITUDE
from lightning_lora.memory.step_trace import trace_step
from lightning_lora.planning.adapter_sizes import adapter_sizes
from tests.support import resuming, toys
from tests.support.monitored import EveryStep
from tests.support.resuming import DiceyLoRA
from tests.support.toys import Plain, Toy, fit

pytestmark = [*toys.expected_warnings]

DORA = LoRAConfig(rank=2, dora=True)


class Mine(Toy):
    lora = DORA

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.lora_parameter_groups(0.01))


def norms(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach().norm(dim=1) for name, layer in lora_layers(module).items()}


def test_magnitudes_train_with_the_adapters_and_the_base_stays(tmp_path: Path) -> None:
    module = Mine()
    base = toys.base_of(module)
    trainer = fit(module, tmp_path, max_epochs=2, callbacks=[LoRAGuard(), FiniteGradients(), CheckpointGuard()])
    assert toys.same(toys.base_of(module), base)
    (group,) = trainer.optimizers[0].param_groups
    assert (group["lr"], group["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in group["params"]} == {id(p) for p in module.parameters() if p.requires_grad}
    layers: Any = lora_layers(module)
    for name, layer in layers.items():
        assert not torch.allclose(layer.lora_magnitude, norms(module)[name], rtol=1e-3), name
        assert id(layer.lora_magnitude) in {id(p) for p in group["params"]}


class DiceyDoRA(DiceyLoRA):
    """With dropout, which takes another way through the layers."""

    lora = replace(DiceyLoRA.lora, dora=True)  # pyright: ignore[reportArgumentType]


def test_a_resumed_run_is_exact(tmp_path: Path) -> None:
    places = ["batch-0-4", "batch-1-7", "epoch-0"]
    resuming.check_exact(DiceyDoRA, tmp_path, places, accumulate_grad_batches=3, val_check_interval=3)


def test_a_checkpoint_holds_adapters_only_and_fits_no_module_without_magnitudes(tmp_path: Path) -> None:
    module = Mine()
    trainer = fit(module, tmp_path)
    trainer.save_checkpoint(tmp_path / "dora.ckpt")
    kept = torch.load(tmp_path / "dora.ckpt", weights_only=True)["state_dict"]
    assert {name for name in kept if not name.endswith(("lora_A", "lora_B"))} == {
        f"net.{layer}.{MAGNITUDE}" for layer in ("first", "second")
    }
    again = Mine.load_from_checkpoint(tmp_path / "dora.ckpt", weights_only=True)
    assert toys.same(lora_state_dict(again), lora_state_dict(module))
    with pytest.raises(AdapterFileError, match="lora_magnitude"):
        fit(Toy(), tmp_path, ckpt_path=tmp_path / "dora.ckpt", max_epochs=2)
    plain = fit(Toy(), tmp_path)
    plain.save_checkpoint(tmp_path / "lora.ckpt")
    with pytest.raises(AdapterFileError, match="lora_magnitude"):
        fit(Mine(), tmp_path, ckpt_path=tmp_path / "lora.ckpt", max_epochs=2)


def test_other_settings_for_adapters_that_exist_are_refused(tmp_path: Path) -> None:
    module = Mine()
    fit(module, tmp_path)
    module.lora = replace(DORA, dora=False)
    with pytest.raises(ConfigError, match="dora True -> False"):
        fit(module, tmp_path)
    module.save_adapter(tmp_path / "adapter")
    loaded = Toy()
    loaded.lora = None
    load_adapter(loaded, tmp_path / "adapter", allow_other_base=True)
    loaded.lora = LoRAConfig(rank=2)
    with pytest.raises(ConfigError, match=r"first: dora 1 -> 0"):
        fit(loaded, tmp_path)


def test_magnitudes_are_averaged(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Look(LoRAGuard):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
            seen.append({name: tensor.clone() for name, tensor in lora_state_dict(pl_module).items()})

    module = Mine()
    fit(module, tmp_path, callbacks=[Look(), AdapterEMA(decay=0.5)])
    for name, tensor in lora_state_dict(module).items():
        average = seen[0][name]
        for state in seen[1:]:
            average = 0.5 * average + 0.5 * state[name]
        torch.testing.assert_close(tensor, average)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_every_precision_starts_at_the_base_and_keeps_magnitudes_wide(precision: Any, tmp_path: Path) -> None:
    first: list[bool] = []

    def look(module: Any) -> None:
        if not first:
            x = torch.randn(5, 4, dtype=next(module.parameters()).dtype)
            y = module.net(x)
            for layer in lora_layers(module).values():
                layer.lora_enabled = False
            first.append(torch.equal(y, module.net(x)))
            for layer in lora_layers(module).values():
                layer.lora_enabled = True

    class Watched(Mine):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            look(self)
            x, y = (tensor.to(next(self.parameters()).dtype) for tensor in batch)
            return (self(x) - y).square().mean()

    module = Watched()
    fit(module, tmp_path, precision=precision)
    assert first == [True]
    wide = torch.float64 if precision == "64-true" else torch.float32
    assert {factor.dtype for factor in lora_state_dict(module).values()} == {wide}
    assert all(toys.moved(module))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.filterwarnings(
    "ignore:.*optimizer steps? (is|are) few whatever the noise", "ignore:training rows come in the"
)
def test_noise_is_measured_by_micro_batches_and_not_by_rows(accumulate: int, tmp_path: Path) -> None:
    monitor = EveryStep()
    words = r"per-row gradients do not exist for net\.first, which has a magnitude \(dora\): set accumulate_grad_batc"
    with pytest.warns(UserWarning, match=words) if accumulate == 1 else nullcontext():
        fit(Mine(), tmp_path, accumulate_grad_batches=accumulate, max_epochs=3, callbacks=[monitor])
    assert (monitor.estimate is not None) is (accumulate == 2)


def test_the_callback_writes_a_folder_that_a_plain_module_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    module = Plain()
    callbacks = [LoRA(DORA), AdapterCheckpoint(dirpath=str(tmp_path / "adapters")), MergeOnFitEnd(str(tmp_path / "m"))]
    fit(module, tmp_path, max_epochs=3, enable_checkpointing=True, callbacks=callbacks)
    plain, x = Plain(), torch.randn(3, 4)
    load_adapter(plain, tmp_path / "adapters" / "last")
    torch.testing.assert_close(plain(x), module(x))
    layers: Any = lora_layers(plain)
    change = [layer.magnitude_change() for layer in layers.values()]
    assert min(change) > 1e-3
    assert cli.main(["inspect", str(tmp_path / "adapters" / "last"), "--verify"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{100 * min(change):.3g} to {100 * max(change):.3g} %" in printed
    for server, words in (("vllm", "vLLM loads no adapters with magnitudes"), ("llama.cpp", "knows no magnitudes")):
        arguments = ["export", str(tmp_path / "adapters" / "last"), str(tmp_path / "out"), "--for", server]
        assert cli.main(arguments) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert words in said
        assert "merged" in said.lower()
        assert not (tmp_path / "out").exists()


def test_lora_plus_leaves_magnitudes_at_the_rate_of_the_adapters(tmp_path: Path) -> None:
    module = Mine()
    module.lora = replace(DORA, lora_plus_ratio=4.0, lr_multiplier_pattern={"net.second": 3.0})
    module.apply_lora()
    rates = {id(p): group["lr"] for group in module.lora_parameter_groups(0.01) for p in group["params"]}
    for name, multiplier in (("net.first", 10), ("net.second", 3)):
        found = [rates[id(factor)] for factor in lora_layers(module)[name].lora_factors().values()]
        assert found == pytest.approx([0.01 * multiplier, 0.04 * multiplier, 0.01 * multiplier])


class Wide(DiceyDoRA):
    """Layers with room to grow."""

    def __init__(self) -> None:
        super().__init__()
        self.net = toys.Net(width=16)
        self.lora = LoRAConfig(rank=1, alpha=2, dora=True)


def test_a_run_whose_ranks_grow_goes_on_exactly(tmp_path: Path) -> None:
    growth = lambda: RankGrowth(every_n_steps=2, threshold=0.01, budget=10_000)  # noqa: E731
    whole = resuming.run(Wide, tmp_path, callbacks=[growth()])
    kept = whole.checkpoint["state_dict"]
    assert kept["net.first.lora_A"].shape[0] > 1
    assert kept["net.first.lora_magnitude"].shape == (16,)
    for place in ("batch-0-1", "batch-1-4"):
        resumed = resuming.run(Wide, tmp_path, tmp_path / f"{place}.ckpt", callbacks=[growth()])
        assert not resuming.unlike(whole, resumed), place


def test_a_plan_counts_magnitudes() -> None:
    module = Mine()
    sizes = adapter_sizes(module, DORA)
    for rank in (1, 2):
        assert sizes.parameters(rank) == inject_lora(Plain(), replace(DORA, rank=rank)).parameters.adapter


def test_a_traced_step_counts_magnitudes() -> None:
    memory = [trace_step(module, next(iter(toys.loader()))).memory for module in (Toy(), Mine())]
    assert memory[1].adapters - memory[0].adapters == 4 * (8 + 2)
