"""Two processes that sample: neither waits for the other for ever, and each draws what it draws alone."""

from __future__ import annotations

import time

import pytest

from tests.support import toys

SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from lightning_lora.sharding import shard_lora
from lightning_lora.tasks.rl.sampling.in_process import InProcessSampler
from lightning_lora.tasks.rl.sampling.samples import SamplingSettings
from tests.support import tiny_models
from tests.tasks.rl.sampling.test_in_process import PROMPTS, adapted

kind, case = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()
most = {"lengths": (3, 40)[rank], "ended": 40, "prompts": 12}[case]
prompts = PROMPTS[: (1, 3)[rank]] if case == "prompts" else PROMPTS
# All rows of rank 0 end with their first token.
stops = range(tiny_models.VOCAB) if case == "ended" and rank == 0 else ()

class Collectives(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))

def sampled(model):
    forwards = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    sampler = InProcessSampler(stop_ids=stops, gather_once=kind != "fsdp2, each token")
    sampler.load(model, 0)
    model.generation_config.eos_token_id = 2 if case == "prompts" else None
    generator = torch.Generator().manual_seed(rank)
    with Collectives() as collectives:
        found = sampler.sample(prompts, 2, SamplingSettings(most), generator)
    return found, len(forwards), collectives.count

alone, *_ = sampled(adapted(tiny_models.llama()))
model = adapted(tiny_models.llama())
if kind != "ddp":
    shard_lora(model, init_device_mesh("cpu", (2,)))
else:
    DistributedDataParallel(model)
found, forwards, collectives = sampled(model)
assert torch.equal(found.tokens, alone.tokens), (rank, found.tokens, alone.tokens)
assert (found.logprobs - alone.logprobs).abs().max() < 1e-5
steps = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
dist.all_gather(steps, torch.tensor([forwards]))
if kind == "fsdp2, each token":
    assert steps[0] == steps[1], steps
    assert collectives > 3 * forwards  # each block, and whether any process goes on
elif kind == "fsdp2":
    assert collectives == 3, collectives  # two blocks, and what is outside of them
    again, _, collectives = sampled(model)
    assert collectives == 3 and torch.equal(again.tokens, alone.tokens)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
if kind != "fsdp2, each token" and case != "prompts":
    assert steps[0] < steps[1], steps
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2, each token"])
@pytest.mark.parametrize("case", ["lengths", "ended", "prompts"])
def test_ranks_that_need_different_numbers_of_steps_do_not_wait_for_ever(kind: str, case: str) -> None:
    start = time.monotonic()
    toys.run_python(SCRIPT, kind, case, ranks=2)
    assert time.monotonic() - start < 60
