"""transformers loads the merged model, and the trained module keeps its adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_lora import ConfigError, LoRAConfig
from lightning_lora.callbacks import MergeOnFitEnd
from lightning_lora.tasks import CausalLM
from tests.support import toys
from tests.support.toys import Net, Toy

pytestmark = toys.expected_warnings


def fit(module: Any, folder: Path, callback: MergeOnFitEnd, data: Any = None, **options: Any) -> Any:
    runner = toys.trainer(folder, callbacks=[callback], **options)
    runner.fit(module, toys.loader() if data is None else data)
    return runner


def token_loader() -> Any:
    return DataLoader(toys.token_rows(), batch_size=4)  # pyright: ignore[reportArgumentType]


def test_merged_folder_loads_in_transformers_and_computes_the_same(llama_folder: Path, tmp_path: Path) -> None:
    module = CausalLM(str(llama_folder), learning_rate=0.01, lora=LoRAConfig(rank=2))
    fit(module, tmp_path, MergeOnFitEnd(), token_loader())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokens = torch.arange(6, 18)[None]
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(tokens), merged(input_ids=tokens).logits)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == len(module.tokenizer)
    assert not [name for name in load_file(tmp_path / "merged" / "model.safetensors") if "lora" in name]


def test_the_module_is_left_as_it_was_bit_for_bit(tmp_path: Path) -> None:
    plain, merging = Toy(), Toy()
    toys.trainer(tmp_path).fit(plain, toys.loader())
    torch.manual_seed(0)
    fit(merging, tmp_path, MergeOnFitEnd(str(tmp_path / "out")))
    assert toys.same(toys.snapshot(plain), toys.snapshot(merging))


def test_a_plain_module_becomes_one_file_of_its_own_names(tmp_path: Path) -> None:
    module = Toy()
    fit(module, tmp_path, MergeOnFitEnd(str(tmp_path / "out")))
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert state.keys() == toys.base_of(module).keys()
    net = Net()
    net.load_state_dict({name.removeprefix("net."): tensor for name, tensor in state.items()})
    x = torch.randn(3, 4)
    torch.testing.assert_close(net(x), module(x))


def test_a_model_without_a_tokenizer_is_merged_too(llama_folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((llama_folder / name).read_bytes())
    module = CausalLM(str(bare), learning_rate=0.01, lora=LoRAConfig(rank=2))
    with pytest.warns(UserWarning, match="the merged model has no tokenizer: there is no usable tokenizer beside"):
        fit(module, tmp_path, MergeOnFitEnd(), token_loader())
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_a_second_run_replaces_the_merged_model(tmp_path: Path) -> None:
    module = Toy()
    for _ in range(2):
        fit(module, tmp_path, MergeOnFitEnd(str(tmp_path / "out")))
    merged = load_file(tmp_path / "out" / "model.safetensors")
    module.merge_lora()
    assert toys.same(merged, toys.base_of(module))


class FSDP1OnCPU(FSDPStrategy):
    """Lightning refuses FSDPStrategy itself without a GPU."""


@pytest.mark.parametrize(
    "strategy", [ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1), FSDP1OnCPU()]
)
def test_sharded_weights_are_refused_before_the_run(strategy: Any, tmp_path: Path) -> None:
    runner = toys.trainer(tmp_path, strategy=strategy)
    with pytest.raises(ConfigError, match=r"cannot merge the sharded weights of .*`lightning-lora merge BASE"):
        MergeOnFitEnd().setup(runner, Toy(), "fit")


def test_a_run_without_adapters_is_refused(tmp_path: Path) -> None:
    module = Toy()
    module.lora = None
    with pytest.raises(ConfigError, match="nothing to merge: the module has no adapters"):
        fit(module, tmp_path, MergeOnFitEnd())
