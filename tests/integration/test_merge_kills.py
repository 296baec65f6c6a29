"""A merge that is killed leaves the base as it was, and its target absent or complete (fault F17)."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_lora import LoRAConfig, inject_lora, save_adapter
from lightning_lora.files.merge.merge_files import merge_files
from tests.support import toys
from tests.support.tiny_models import wake
from tests.support.toys import tree

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

TRIALS = 12
MOST_TRIALS = 100


def merge(folder: Path, out: Path) -> int:
    """Start a merge in a process of its own."""
    pid = os.fork()
    if pid == 0:
        merge_files(folder / "base", folder / "adapter", out)
        os._exit(0)
    return pid


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_after_any_kill_the_base_is_untouched_and_the_result_absent_or_complete(tmp_path: Path) -> None:
    toys.save_llama(tmp_path / "base", hidden_size=256, intermediate_size=768, num_hidden_layers=6)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    inject_lora(model, LoRAConfig(rank=4))
    wake(model)
    save_adapter(model, tmp_path / "adapter")
    base = tree(tmp_path / "base")
    start = time.perf_counter()
    os.waitpid(merge(tmp_path, tmp_path / "whole"), 0)
    duration, whole = time.perf_counter() - start, tree(tmp_path / "whole")
    assert whole
    numbers, in_the_middle = random.Random(0), 0
    for trial in range(MOST_TRIALS):
        out = tmp_path / f"out-{trial}"
        pid = merge(tmp_path, out)
        delay = numbers.uniform(0, 1.1) * duration
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            in_the_middle += 1
        else:
            # The first merge was slower: it read the base from the disk, or the machine was busy then.
            duration = min(duration, delay)
        assert tree(tmp_path / "base") == base
        assert not out.exists() or tree(out) == whole
        if in_the_middle == TRIALS:
            break
    assert in_the_middle == TRIALS
