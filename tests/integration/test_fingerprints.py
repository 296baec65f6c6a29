"""One base has one fingerprint, however it is sharded and whenever it got its values, without being put together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import load_adapter, lora_state_dict
from lightning_lora.errors import BaseMismatchError
from lightning_lora.lora.fingerprint import base_digests, fingerprint
from tests.support import toys
from tests.support.tiny_models import llama

pytestmark = [pytest.mark.slow, *toys.expected_warnings]

DIGESTS = """
import itertools, json, os, sys, warnings
warnings.simplefilter("ignore")
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from lightning_lora import LoRAConfig, inject_lora, save_adapter
from lightning_lora.lora.fingerprint import base_digests, fingerprint, tensor_digest
from lightning_lora.lora.shards import every_nth
from lightning_lora.memory.process_peak import peak_bytes
from lightning_lora.sharding import shard_lora
from tests.support.tiny_models import llama, wake

dist.init_process_group("gloo")
one, two = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
torch.manual_seed(0)
shapes = ((7, 5), (1, 3), (300, 300, 3), (0, 4), (), (2,))
for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.bool):
    for shape in shapes if dtype is torch.float32 else shapes[:2]:
        whole = (torch.randn(shape) * 9).to(dtype)
        options = [Replicate(), *map(Shard, range(len(shape)))]
        for mesh in (one, two):
            for places in itertools.product(options, repeat=mesh.ndim):
                sharded = distribute_tensor(whole, mesh, places)
                twice = len(places) == 2 and places[0] == places[1] and isinstance(places[0], Shard)
                entries = every_nth(sharded, 3)
                assert (entries is None) == twice, (shape, places)
                assert twice or torch.equal(entries, whole.reshape(-1)[::3]), (dtype, shape, places)
                for exact in (False, True):
                    assert tensor_digest(sharded, exact) == tensor_digest(whole, exact), (dtype, shape, places)
summands = DTensor.from_local(torch.ones(3), one, [Partial()])
assert tensor_digest(summands) == tensor_digest(torch.full((3,), 4.0))

model = llama()
expected = base_digests(model)
inject_lora(model, LoRAConfig(rank=2))
torch.manual_seed(3)
wake(model)
if dist.get_rank() == 0:
    torch.save(model.state_dict(), sys.argv[1] + "/whole.pt")
shard_lora(model, one)
assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
assert base_digests(model) == expected
save_adapter(model, sys.argv[1] + "/adapter")

peak = lambda: peak_bytes(torch.device("cpu")) // 2**20
large = DTensor.from_local(torch.ones(1024, 8192), one, [Shard(0)])  # 128 MB, 32 MB a rank
before = peak()
tensor_digest(large)
after_digest = peak()
large.full_tensor()
dist.barrier()
if dist.get_rank() == 0:
    grown = {"digest": after_digest - before, "whole": peak() - after_digest, "fingerprint": fingerprint(expected)}
    open(sys.argv[1] + "/grown.json", "w").write(json.dumps(grown))
dist.destroy_process_group()
"""

LATE = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.sharding import shard_lora
from tests.support import toys

folder = Path(sys.argv[1])

class Ours(toys.Toy):
    def configure_model(self):
        values = self.net.state_dict()
        with torch.device("meta"):
            self.net = toys.Net()
        self.apply_lora()
        assert self._lora_base is None
        shard_lora(self.net, self.device_mesh)
        self.net.to_empty(device="cpu")
        set_model_state_dict(self.net, values, options=StateDictOptions(full_state_dict=True, strict=False))
        for layer in lora_layers(self.net).values():
            layer.reset_factors()

strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
trainer = toys.trainer(folder, devices=2, strategy=strategy)
trainer.fit(Ours(), toys.loader())
trainer.save_checkpoint(folder / "two.ckpt")
torch.distributed.destroy_process_group()  # threads of gloo that are left at exit may abort the process
"""


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes have found out and written."""
    folder = tmp_path_factory.mktemp("four")
    toys.run_python(DIGESTS, folder, ranks=4)
    return folder


def test_digests_of_shards_are_those_of_the_whole(four: Path) -> None:
    found = json.loads((four / "grown.json").read_text())
    assert found["fingerprint"] == fingerprint(base_digests(llama()))


def test_a_sharded_tensor_is_not_put_together(four: Path) -> None:
    """A tensor of 128 MB on four ranks: megabytes by which the peak of rank 0 grows."""
    found = json.loads((four / "grown.json").read_text())
    assert found["digest"] < 8
    assert found["whole"] > 64


def test_an_adapter_of_four_shards_loads_on_one_device_and_on_no_other_base(four: Path) -> None:
    model, state = llama(), torch.load(four / "whole.pt", weights_only=True)
    load_adapter(model, four / "adapter")
    assert toys.same(lora_state_dict(model), {name: state[name] for name in state if "lora_" in name})
    other = llama()
    with torch.no_grad():
        next(other.parameters())[0] += 1
    with pytest.raises(BaseMismatchError, match="was trained on a base with fingerprint"):
        load_adapter(other, four / "adapter")
    load_adapter(other, four / "adapter", allow_other_base=True)
    assert toys.same(lora_state_dict(other), lora_state_dict(model))


def test_a_checkpoint_of_fsdp2_has_the_fingerprint_of_one_device(tmp_path: Path) -> None:
    """Of a base that was built on the meta device and had no values when the adapters were put in."""
    toys.run_python(LATE, tmp_path, ranks=2)
    trainer = toys.trainer(tmp_path)
    trainer.fit(toys.Toy(), toys.loader())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.ckpt", "two.ckpt"))
    assert one["lightning_lora"]["base_fingerprint"] == two["lightning_lora"]["base_fingerprint"]
    assert one["lightning_lora"]["base_fingerprint"] is not None

    def again(**settings: Any) -> None:
        module = toys.Toy(**settings)
        toys.trainer(tmp_path, max_epochs=2).fit(
            module, toys.loader(), ckpt_path=tmp_path / "two.ckpt", weights_only=True
        )

    with pytest.warns(UserWarning, match="written by 2 ranks and is read by 1"):
        again()
    with pytest.raises(BaseMismatchError, match=r"set lora_allow_other_base = True .*--allow_other_base true"):
        again(seed=5)
