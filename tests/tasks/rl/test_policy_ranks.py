"""Policies on two ranks: one gradient, no waiting for ever, and from where a run has stopped."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from lightning_lora.tasks.rl.sampling.samples import SamplingSettings
from tests.support import toys
from tests.support.resuming import differences
from tests.tasks.rl.policies import PlainSampler

SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch
from torch import distributed as dist
from lightning_lora.lora.shards import full_tensor
from lightning_lora.sharding import FSDP2Strategy
from lightning_lora.tasks.rl.sampling.in_process import InProcessSampler
from tests.tasks.rl import policies, test_policy_ranks, test_policy_gradient, test_rollouts

case, kind, llama, out, ranks = sys.argv[1:6]
out, ranks = Path(out), int(ranks)
make = {"single": lambda: "auto", "ddp": lambda: "ddp", "fsdp2": lambda: FSDP2Strategy()}[kind]
options = dict(devices=ranks, strategy=make())
rank = int(__import__("os").environ.get("RANK", 0))
torch.manual_seed(0)
if case == "gradient":
    settings = {"tokens": {}, "rows": {"normalise": "rows"}, "values": {"advantage": "gae"},
                "batch": {"advantage": "batch"}}[sys.argv[6]]
    seen = test_policy_gradient.Gradients()
    module = policies.make(llama, sampler=test_policy_ranks.OfPrompt(), **settings)
    loader = policies.prompt_loader(4, batch_size=4 // ranks)
    policies.fit(module, out, loader=loader, max_steps=1, callbacks=[seen], **options)
    found = {name: full_tensor(gradient) for name, gradient in seen.steps[0].items()}
    if rank == 0:
        torch.save(found, out / f"{kind}.pt")
elif case == "uneven":
    # Rank 0 ends every completion with its first token, and earns nothing.
    stops = range(400) if rank == 0 else ()
    reward = policies.nothing if rank == 0 else policies.count_letters
    settings = {"plain": {"kl_coefficient": 0.1}, "values": {"advantage": "gae", "minibatches": 2, "loss": "clip"}}
    module = policies.make(llama, reward, sampler=InProcessSampler(stop_ids=stops), max_new_tokens=(3, 30)[rank],
                           **settings[sys.argv[6]])
    before = {name: full_tensor(p).clone() for name, p in module.named_parameters()}
    validation = policies.prompt_loader(4, shuffle=False)
    runner = policies.fit(module, out, loader=policies.prompt_loader(8), validation=validation, max_steps=4, **options)
    assert runner.callback_metrics["constant_groups"] >= 0.5
    assert runner.callback_metrics["sampler_mismatch"] < 1e-4
    own = torch.cat([full_tensor(p).flatten() for p in module.parameters() if p.requires_grad])
    both = [torch.zeros_like(own) for _ in range(2)]
    dist.all_gather(both, own)
    assert torch.equal(*both) and own.isfinite().all()
else:
    path = out / sys.argv[6] if len(sys.argv) > 6 else None
    torch.manual_seed(3 if path else 0)
    callbacks = [] if path else [test_rollouts.Save()]
    module = policies.make(llama, minibatches=2, epochs=2, loss="clip")
    try:
        runner = policies.fit(module, out, loader=policies.prompt_loader(8), max_epochs=2, ckpt_path=path,
                              callbacks=callbacks, **options)
        runner.save_checkpoint(out / f"end-{bool(path)}.ckpt")
    except Exception as error:
        print(type(error).__name__, error)
if dist.is_initialized():
    dist.destroy_process_group()
"""


class OfPrompt(PlainSampler):
    """Draws what the prompt and the number of its completion alone decide, on whichever rank it is."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: Counter[int] = Counter()

    @override
    def _row(
        self, prompt: Tensor, settings: SamplingSettings, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, int, bool]:
        name = int(prompt.sum())
        self.drawn[name] += 1
        return super()._row(prompt, settings, torch.Generator().manual_seed(100 * name + self.drawn[name]))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["tokens", "rows", "values", "batch"])
def test_two_ranks_have_the_gradient_of_one(how: str, llama_folder: Path, tmp_path: Path) -> None:
    for kind, ranks in (("single", 1), ("ddp", 2), ("fsdp2", 2)):
        toys.run_python(SCRIPT, "gradient", kind, llama_folder, tmp_path, ranks, how, ranks=ranks)
    one = torch.load(tmp_path / "single.pt", weights_only=True)
    for kind in ("ddp", "fsdp2"):
        found = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
        assert found.keys() == one.keys()
        for name, gradient in one.items():
            assert torch.allclose(gradient, found[name], rtol=1e-3, atol=1e-6), (kind, name)
    assert any(gradient.any() for gradient in one.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("how", ["plain", "values"])
def test_a_rank_that_is_done_at_once_and_earns_nothing_holds_nobody_up(
    how: str, kind: str, llama_folder: Path, tmp_path: Path
) -> None:
    start = time.monotonic()
    toys.run_python(SCRIPT, "uneven", kind, llama_folder, tmp_path, 2, how, ranks=2)
    assert time.monotonic() - start < 60


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_go_on_bit_by_bit_and_one_rank_only_between_rollouts(
    kind: str, llama_folder: Path, tmp_path: Path
) -> None:
    toys.run_python(SCRIPT, "resume", kind, llama_folder, tmp_path, 2, ranks=2)
    whole = torch.load(tmp_path / "end-False.ckpt", weights_only=True)
    # In the middle of the first rollout of the second epoch, and after its last minibatch.
    for place in ("1-3.ckpt", "1-4.ckpt"):
        toys.run_python(SCRIPT, "resume", kind, llama_folder, tmp_path, 2, place, ranks=2)
        resumed = torch.load(tmp_path / "end-True.ckpt", weights_only=True)
        assert not differences(whole, resumed)[:3], place
    (tmp_path / "end-True.ckpt").unlink()
    done = toys.run_python(SCRIPT, "resume", "single", llama_folder, tmp_path, 1, "1-3.ckpt")
    assert (
        "DataError this checkpoint was written inside a rollout, after 3 of its 4 minibatches on 2 ranks" in done.stdout
    )
    assert not (tmp_path / "end-True.ckpt").exists()
    toys.run_python(SCRIPT, "resume", "single", llama_folder, tmp_path, 1, "1-4.ckpt")
    assert (tmp_path / "end-True.ckpt").exists()
