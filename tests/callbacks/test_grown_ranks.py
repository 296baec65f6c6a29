"""Grown ranks in two processes and on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_lora import load_adapter
from lightning_lora.cli.embedded import MODEL
from tests.support import toys
from tests.support.commands import EMBEDDED, assert_same_logits, configs, lightning_lora
from tests.support.resuming import differences

SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch
from lightning_lora.callbacks import AdapterEMA, LoRAGuard, RankGrowth
from tests.callbacks.test_rank_growth import Dicey
from tests.support import resuming, toys

folder = Path(sys.argv[1])

class Ours(Dicey):
    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)

def run(place=None):
    torch.manual_seed(0)
    growth = RankGrowth(every_n_steps=2, threshold=0.01, budget=10000, max_rank=4)
    recorder = resuming.Recorder(folder if place is None else None)
    trainer = toys.trainer(
        folder, max_epochs=3, accumulate_grad_batches=2, devices=2, strategy="ddp",
        callbacks=[growth, AdapterEMA(0.6), LoRAGuard(), recorder],
    )
    loader = torch.utils.data.DataLoader(toys.rows(4 * resuming.NUM_BATCHES), batch_size=2)
    module = Ours()
    trainer.fit(module, loader, ckpt_path=None if place is None else folder / f"{place}.ckpt", weights_only=True)
    factors = torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])
    both = [torch.empty_like(factors) for _ in range(2)]
    torch.distributed.all_gather(both, factors)
    assert torch.equal(*both), "ranks must stay equal"
    trainer.save_checkpoint(folder / f"end{place}.ckpt")
    return growth.growths

whole = run()
assert len({growth["step"] for growth in whole}) > 1, whole
assert run("batch-0-3") == whole
assert run("batch-1-3") == whole
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_grow_alike_and_go_on_exactly(tmp_path: Path) -> None:
    toys.run_python(SCRIPT, tmp_path, ranks=2)
    places = (None, "batch-0-3", "batch-1-3")
    whole, *resumed = (torch.load(tmp_path / f"end{place}.ckpt", weights_only=True) for place in places)
    for other in resumed:
        assert not differences(whole, other), differences(whole, other)[:5]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*")
def test_a_run_whose_ranks_have_grown_is_read_by_every_command_and_by_peft(tmp_path: Path) -> None:
    files = configs("sft.yaml", "lora.yaml", "rank_growth.yaml")
    growth = [
        "--trainer.callbacks.every_n_steps=1",
        "--trainer.callbacks.threshold=0.001",
        "--trainer.callbacks.budget=45840",
        "--model.init_args.lora.rank=2",
    ]
    done = lightning_lora("fit", *files, *EMBEDDED, *growth, "--trainer.max_steps=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rank growth at step 1: " in done.stdout + done.stderr
    adapter = next(path.parent for path in sorted(tmp_path.rglob("adapter_config.json")))
    described = json.loads((adapter / "adapter_config.json").read_text())
    assert described["rank_pattern"]
    ours = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    load_adapter(ours, adapter)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), adapter)
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert_same_logits(ours(input_ids=tokens).logits, theirs(input_ids=tokens).logits)
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    run = adapter.parents[1]
    for command in (
        ("validate", *files, *EMBEDDED, "--model.init_args.lora.rank=2", f"--ckpt_path={checkpoint}"),
        ("generate", str(run), "--prompt", "What is 2 + 3?", "--max_new_tokens", "4"),
        ("export", str(checkpoint), str(tmp_path / "exported")),
        ("merge", str(MODEL), str(adapter), str(tmp_path / "merged"), "--dtype=float32"),
    ):
        done = lightning_lora(*command, cwd=tmp_path)
        assert done.returncode == 0, f"{command[0]}: {done.stdout[-2000:]} {done.stderr[-3000:]}"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        assert_same_logits(merged(input_ids=tokens).logits, ours(input_ids=tokens).logits)
