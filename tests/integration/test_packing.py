"""Two processes train on packs what one device trains, and refuse together what mixes examples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from tests.support import toys, warm
from tests.support.tiny_tokenizer import tiny_tokenizer

pytestmark = [pytest.mark.slow, *toys.expected_warnings]

SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import datasets.config, torch
from lightning.pytorch import seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_lora import LoRAConfig, lora_state_dict
from lightning_lora.data import SFTDataModule
from lightning_lora.tasks import CausalLM
from tests.support import toys

model, rows, out, strategy = sys.argv[1:]
datasets.config.HF_DATASETS_CACHE = Path(out).parent / "cache"
ranks = 1 if strategy == "auto" else 2
if strategy == "fsdp2":
    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
seed_everything(0, verbose=False)
module = CausalLM(model, 1e-3, lora=LoRAConfig(rank=2))
trainer = toys.trainer(Path(out).parent, devices=ranks, strategy=strategy, accumulate_grad_batches=2, max_epochs=2)
data = SFTDataModule(rows, batch_size=2 // ranks, max_length=40, packing=True)
trainer.fit(module, datamodule=data)
assert data.statistics["train"].packed_rows % 2 == 1, "an empty pack is needed to share these"
state = lora_state_dict(module)
if trainer.is_global_zero:
    torch.save(state, out)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def run(model: Path, strategy: str, folder: Path) -> warm.Done:
    """Packs of 23 short rows on one device or two; the adapters go to a file named after the strategy."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(f'{{"question": "{"what " * (1 + n % 6)}", "answer": "{n}"}}\n' for n in range(23)))
    out, ranks = folder / f"{strategy}.pt", 1 if strategy == "auto" else 2
    return toys.run_python(SCRIPT, model, rows, out, strategy, ranks=ranks, check=False)


def test_packs_train_the_same_on_one_device_and_on_two(tmp_path: Path) -> None:
    llama = toys.save_llama(tmp_path / "llama")
    for strategy in ("auto", "ddp", "fsdp2"):
        done = run(llama, strategy, tmp_path)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    expected = torch.load(tmp_path / "auto.pt")
    assert any(tensor.any() for name, tensor in expected.items() if "lora_B" in name)
    for strategy in ("ddp", "fsdp2"):
        torch.testing.assert_close(torch.load(tmp_path / f"{strategy}.pt"), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_all_processes_refuse_together(strategy: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)).save_pretrained(
        tmp_path / "bloom"
    )
    tokenizer.save_pretrained(tmp_path / "bloom")
    done = run(tmp_path / "bloom", strategy, tmp_path)
    assert done.returncode != 0
    assert "BloomForCausalLM does not keep packed examples apart" in done.stderr
    assert not (tmp_path / f"{strategy}.pt").exists()
