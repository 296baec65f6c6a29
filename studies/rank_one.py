"""Is rank 1 enough for reinforcement learning (T6): six digits to be sorted, rewards for exact answers.

    PYTHONPATH=. python studies/rank_one.py

A small model learns the task in part from examples, and the rest from rewards: in full, and with adapters of rank 1 and
8, with and without the output layer. Controls: no reward, shuffled rewards, and examples at rank 1 instead of rewards.
Each run is a file below ``--out``; runs that have one are not repeated, and several processes of this command share the
work. The curves of all runs are written to ``results.csv`` in ``docs/findings/rank_one``, with a picture of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from typing_extensions import override

from lightning_lora import LoRAConfig
from lightning_lora.files.atomic import atomic_file
from lightning_lora.lora.reports import count_parameters
from lightning_lora.tasks import CausalLM, PolicyGradient
from studies.modules import reward_curves, sorting
from studies.modules.pages import FINDINGS, read_lines, write_lines

PROMPTS, GROUP, STEPS, EVERY = 32, 8, 150, 25
FULL_RATES = (3e-5, 5e-5, 1e-4, 2e-4, 3e-4)
LORA_RATES = (3e-4, 5e-4, 1e-3, 2e-3, 3e-3)
MIDDLE = 2
MULTIPLIER = 10.0


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        arm: What is trained: ``full``, or ``r1``, ``r8``, with ``+head`` where the output layer is adapted.
        rate: Learning rate of what is trained.
        seed: Of the warm start, the order of the prompts and the samples.
        control: ``none`` for rewards of right answers; ``zero``, ``shuffled``, or ``examples`` instead of rewards.
    """

    arm: str
    rate: float
    seed: int
    control: str = "none"

    @property
    def name(self) -> str:
        """The file of the run, without its ending."""
        return f"{self.control}_{self.arm}_{self.rate:g}_{self.seed}"

    @property
    def lora(self) -> LoRAConfig | None:
        """The adapters of the arm."""
        if self.arm == "full":
            return None
        return LoRAConfig(rank=int(self.arm[1]), adapt_head=self.arm.endswith("+head"), lr_multiplier=MULTIPLIER)

    @property
    def learning_rate(self) -> float:
        """The rate in terms of full fine-tuning, which tasks take."""
        return self.rate if self.lora is None else self.rate / MULTIPLIER


def cells(num_seeds: int) -> Iterator[Cell]:
    """All runs: first every arm at the middle rate, then controls, further seeds and other rates."""
    arms = ("full", "r1+head", "r8+head", "r1", "r8")
    for seed in range(num_seeds):
        for arm in arms:
            yield Cell(arm, FULL_RATES[MIDDLE] if arm == "full" else LORA_RATES[MIDDLE], seed)
        yield from (Cell("r1+head", LORA_RATES[MIDDLE], seed, control) for control in ("zero", "shuffled", "examples"))
        yield from (
            Cell(arm, rate, seed, "shuffled")
            for arm, rate in (("full", FULL_RATES[MIDDLE]), ("r1+head", LORA_RATES[0]))
        )
        for place in (0, 4, 1, 3):
            yield from (Cell(arm, (FULL_RATES if arm == "full" else LORA_RATES)[place], seed) for arm in arms)


class Curve(Callback):
    """Keeps what every evaluation finds.

    Attributes:
        step: The optimizer step of an evaluation outside of training.
    """

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []
        self.step: int | None = None

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a point."""
        names = ("val_reward", "val_reward_greedy", "reward", "entropy", "sampler_mismatch", "constant_groups")
        found = {name: float(trainer.callback_metrics[name]) for name in names if name in trainer.callback_metrics}
        self.points.append({"step": trainer.global_step if self.step is None else self.step} | found)


def train(cell: Cell, folder: Path) -> dict[str, Any]:
    """Run a cell: its curve, its time and what it trained."""
    start = time.perf_counter()
    rows = sorting.questions(sorting.HELD_OUT + STEPS * PROMPTS, seed=0)
    held_out, prompts = rows[: sorting.HELD_OUT], rows[sorting.HELD_OUT :]
    base = folder / f"base_{cell.seed}"
    if not (base / "tokenizer_config.json").exists():
        sorting.warm_model(base, cell.seed, held_out)
    seed_everything(cell.seed, verbose=False)
    curve, settings = Curve(), {"model": str(base), "learning_rate": cell.learning_rate, "lora": cell.lora}
    policy = PolicyGradient(
        **settings,  # type: ignore[arg-type]
        reward=sorting.reward,
        reward_workers=0,
        group_size=GROUP,
        max_new_tokens=sorting.ANSWER_TOKENS,
    )
    evaluated = sorting.prompt_loader(held_out, sorting.HELD_OUT)
    _trainer(curve).validate(policy, evaluated, verbose=False)
    if cell.control == "examples":
        examples = CausalLM(**settings)  # type: ignore[arg-type]
        _trainer(max_steps=STEPS).fit(examples, sorting.example_loader(prompts, PROMPTS, shuffle=True))
        policy.load_state_dict(examples.state_dict(), strict=False)
    else:
        schedule: dict[str, Any] = {"val_check_interval": EVERY, "check_val_every_n_epoch": None}
        loader = sorting.prompt_loader(prompts, PROMPTS, shuffle=True, control=cell.control)
        _trainer(curve, max_steps=STEPS, **schedule).fit(policy, loader, evaluated)
    # A run without rewards ends early.
    if curve.points[-1]["step"] < STEPS:
        curve.step = STEPS
        _trainer(curve).validate(policy, evaluated, verbose=False)
    trained = count_parameters(policy).trainable
    return dataclasses.asdict(cell) | {
        "trained": trained,
        "seconds": time.perf_counter() - start,
        "bits": policy.signal.bits,
        "points": curve.points,
    }


def _trainer(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings: dict[str, Any] = dict.fromkeys(quiet, False) | {"logger": False, "num_sanity_val_steps": 0} | options
    return Trainer(accelerator="cpu", callbacks=list(callbacks), **settings)


def run(folder: Path, num_seeds: int, most: int) -> None:
    """Run at most ``most`` cells that have no file yet and that no other process has begun."""
    folder.mkdir(parents=True, exist_ok=True)
    for cell in cells(num_seeds):
        if most < 1:
            return
        begun, done = folder / f"{cell.name}.begun", folder / f"{cell.name}.json"
        if done.exists():
            continue
        try:
            begun.touch(exist_ok=False)
        except FileExistsError:
            continue
        result = train(cell, folder)
        with atomic_file(done) as file:
            file.write(json.dumps(result, indent=1).encode())
        begun.unlink()
        most -= 1
        last = result["points"][-1]
        print(f"{cell.name}: {last} in {result['seconds']:.0f} s", flush=True)


def table(folder: Path) -> list[dict[str, Any]]:
    """A line for every point of the curve of every run in ``folder``."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    kept = ("control", "arm", "rate", "seed", "trained", "bits", "seconds")
    names = ("step", "val_reward", "val_reward_greedy", "entropy", "sampler_mismatch")
    return [
        {name: result[name] for name in kept} | {name: point.get(name, "") for name in names}
        for result in found
        for point in result["points"]
    ]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs", "rank_one"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=1000, help="runs of this process at most")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run(options.out, options.seeds, options.runs)
    target = FINDINGS / "rank_one"
    write_lines(target / "results.csv", table(options.out))
    reward_curves.draw(read_lines(target / "results.csv"), target / "curves.png")


if __name__ == "__main__":
    main()
