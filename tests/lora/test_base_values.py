"""With adapters disabled, modules trained in full compute with the values of the base too."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig, LoRAMixin, disable_lora, inject_lora, load_adapter, remove_lora, save_adapter
from lightning_lora.errors import AlreadyShardedError, ConfigError

CONFIG = LoRAConfig(rank=2, targets=["body"], trainable=["norm", "head"])


class Net(nn.Module):
    """A network whose head is tied to its table, with running statistics within and outside of what is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.early, self.body, self.norm = nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(self.early(self.table(x)))))


class Module(LoRAMixin, LightningModule):
    lora = CONFIG

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        with torch.no_grad(), disable_lora(self):
            reference = self(batch)
        return nn.functional.cross_entropy(self(batch), batch.flip(0)) + 0.01 * (reference**2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.lora_parameter_groups(0.1))


X = torch.arange(12)


def trained(module: Any) -> Any:
    """``module`` after some steps that change all that can change."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.1)
    module.train()
    for _ in range(3):
        nn.functional.cross_entropy(module(X), X.flip(0)).backward()
        optimizer.step()
    return module.eval()


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.fixture
def pair() -> tuple[Net, Net]:
    base = Net().eval()
    module = copy.deepcopy(base)
    inject_lora(module, CONFIG)
    return base, trained(module)


def test_disabling_gives_the_base_and_restores_every_object_and_bit(pair: tuple[Net, Net]) -> None:
    base, module = pair
    before, objects = bits(module), {name: id(p) for name, p in module.named_parameters(remove_duplicate=False)}
    gradients = [parameter.grad for parameter in module.parameters()]
    after = module(X)
    with torch.no_grad(), disable_lora(module):
        assert torch.equal(module(X), base(X))
        assert module.head.weight is module.table.weight
        with disable_lora(module):
            assert torch.equal(module(X), base(X))
        assert torch.equal(module(X), base(X))
    assert (after - base(X)).abs().max() > 0.1
    with pytest.raises(KeyError), disable_lora(module):
        raise KeyError
    assert torch.equal(module(X), after)
    assert {name: id(p) for name, p in module.named_parameters(remove_duplicate=False)} == objects
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(now is then for now, then in zip((p.grad for p in module.parameters()), gradients, strict=True))


def test_a_forward_pass_of_the_base_in_training_changes_no_statistics(pair: tuple[Net, Net]) -> None:
    base, module = pair
    before = bits(module)
    module.train()
    with disable_lora(module):
        module(X)
    with disable_lora(module.eval()):
        assert torch.equal(module(X), base(X))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_graphs_made_on_either_side_of_the_context_keep_their_weights(pair: tuple[Net, Net]) -> None:
    base, module = pair
    noise = torch.randn(12, 8)

    def gradient(net: Net, context: bool) -> Tensor:
        leaf = noise.clone().requires_grad_()
        if context:
            with disable_lora(net):
                y = net.head(net.norm(net.body(leaf)))
        else:
            y = net.head(net.norm(net.body(leaf)))
            with disable_lora(net):
                net(X)
        return torch.autograd.grad(y.square().sum(), leaf)[0]

    plain = copy.deepcopy(module)
    plain(X)
    leaf = noise.clone().requires_grad_()
    expected = torch.autograd.grad(plain.head(plain.norm(plain.body(leaf))).square().sum(), leaf)[0]
    assert torch.equal(gradient(module, context=False), expected)
    torch.testing.assert_close(gradient(module, context=True), gradient(base_adapted(base), context=True))


def base_adapted(base: Net) -> Net:
    fresh = copy.deepcopy(base)
    inject_lora(fresh, CONFIG)
    return fresh


def test_copies_pickles_and_other_types_know_the_base(pair: tuple[Net, Net]) -> None:
    base, module = pair
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with disable_lora(twin):
            assert torch.equal(twin(X), base(X))
    low, low_base = copy.deepcopy(module).to(torch.bfloat16), copy.deepcopy(base).to(torch.bfloat16)
    with disable_lora(low):
        assert torch.equal(low(X), low_base(X))


def test_a_loaded_adapter_leaves_the_values_of_the_base_alone(pair: tuple[Net, Net], tmp_path: Path) -> None:
    base, module = pair
    save_adapter(module, tmp_path / "adapter")
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for fresh in (copy.deepcopy(base), base_adapted(base)):
        load_adapter(fresh, tmp_path / "adapter")
        assert not torch.equal(fresh.head.weight, base.head.weight)
        with disable_lora(fresh.eval()):
            assert torch.equal(fresh(X), base(X))
        assert all(torch.equal(getattr(fresh.norm, name), getattr(module.norm, name)) for name in statistics)


def test_nothing_is_kept_where_nothing_but_adapters_changes() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    inject_lora(module, LoRAConfig(rank=2))
    assert not any("lora_base_values" in child.__dict__ for child in module.modules())


def test_removing_adapters_frees_the_copies(pair: tuple[Net, Net]) -> None:
    _, module = pair
    remove_lora(module)
    assert not any("lora_base_values" in child.__dict__ for child in module.modules())


def test_modules_without_values_and_shards_are_refused_with_nothing_changed(pair: tuple[Net, Net]) -> None:
    with torch.device("meta"):
        empty = Net()
    inject_lora(empty, CONFIG)
    empty.to_empty(device="cpu")
    with pytest.raises(ConfigError, match=r"meta device when the module was adapted \(Embedding.weight"):
        disable_lora(empty).__enter__()
    _, module = pair
    before = module(X)
    module.head.weight._fsdp_flattened = True  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(AlreadyShardedError, match=r"2 tensors trained in full are sharded \(Embedding.weight"):
        disable_lora(module).__enter__()
    assert torch.equal(module(X), before)


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*is deprecated")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_resumed_run_and_a_loaded_checkpoint_know_the_base(tmp_path: Path) -> None:
    batches = DataLoader(X.repeat(4), batch_size=12)  # pyright: ignore[reportArgumentType]
    options: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "default_root_dir": tmp_path, "enable_checkpointing": False,
    }  # fmt: skip
    module = Module()
    base = copy.deepcopy(module).eval()
    trainer = Trainer(max_epochs=1, **options)
    trainer.fit(module, batches)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    resumed = Module()
    Trainer(max_epochs=2, **options).fit(resumed, batches, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    loaded = Module.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    for found in (module, resumed, loaded):
        found.eval()
        assert (found(X) - base(X)).abs().max() > 0.01
        with disable_lora(found):
            assert torch.equal(found(X), base(X))
