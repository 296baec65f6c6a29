"""The cost of every operation grows linearly with the number of layers, measured in function calls instead of time."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lightning_lora import (
    LoRAConfig,
    count_parameters,
    inject_lora,
    load_adapter,
    merge_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.files.adapter.manifest import MANIFEST_FILE
from lightning_lora.files.merge.merged_model import save_merged
from tests.support.moe_models import moe
from tests.support.tiny_models import llama, wake

pytestmark = [
    pytest.mark.filterwarnings("ignore:rank 2 is more than:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*has no lightning_lora.json:UserWarning"),
    pytest.mark.filterwarnings("ignore:PEFT cannot load this adapter:UserWarning"),
]


class Block(nn.Module):
    """A recurrent layer, a convolution and a transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4)
        self.convolution = nn.Conv1d(4, 4, 1)
        self.layer = nn.TransformerEncoderLayer(4, 2, 4)


# Number of blocks to model, and settings that name layers in every possible way.
CASES: dict[str, tuple[Callable[[int], nn.Module], dict[str, Any]]] = {
    "llama": (lambda n: llama(num_hidden_layers=n), {}),
    "patterns": (
        lambda n: llama(num_hidden_layers=n),
        {
            "targets": ["q_proj", "up_proj"],
            "exclude": ["*.layers.0.*"],
            "rank_pattern": {"up_proj": 1},
            "alpha_pattern": {"up_proj": 3.0},
            "trainable": ["input_layernorm"],
        },
    ),
    "experts": (lambda n: moe("qwen3_moe", num_hidden_layers=n, num_experts=2), {"rank": 4}),
    "other layers": (lambda n: nn.Sequential(*(Block() for _ in range(n))), {"rank": 1}),
}


def calls(step: Callable[[], object]) -> dict[Any, int]:
    """Function to number of calls during ``step``, C functions included."""
    profile = cProfile.Profile()
    profile.runcall(step)
    stats: Any = pstats.Stats(profile)
    return {function: entry[1] for function, entry in stats.stats.items()}


def set_up(case: str, num_blocks: int, folder: Path) -> dict[str, dict[Any, int]]:
    """Operation to its function calls, on a model with ``num_blocks`` blocks."""
    build, settings = CASES[case]
    model, again, foreign = build(num_blocks), build(num_blocks), build(num_blocks)
    config = LoRAConfig.from_dict({"rank": 2, **settings})
    found = {"inject": calls(lambda: inject_lora(model, config)), "count": calls(lambda: count_parameters(model))}
    wake(model)
    found["save"] = calls(lambda: save_adapter(model, folder / "adapter"))
    found["load"] = calls(lambda: load_adapter(model, folder / "adapter"))
    found["load into a plain model"] = calls(lambda: load_adapter(again, folder / "adapter", allow_other_base=True))
    if case != "other layers":  # PEFT has no format for some of these
        (folder / "adapter" / MANIFEST_FILE).unlink()
        found["load a folder of PEFT"] = calls(lambda: load_adapter(foreign, folder / "adapter"))
    found["merge"] = calls(lambda: merge_lora(model))
    found["unmerge"] = calls(lambda: unmerge_lora(model))
    found["save merged"] = calls(lambda: save_merged(model, folder / "merged"))
    found["remove"] = calls(lambda: remove_lora(model))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_set_up_is_linear_in_the_number_of_layers(case: str, tmp_path: Path) -> None:
    set_up(case, 2, tmp_path / "warm")  # caches and lazy imports
    once, twice = (set_up(case, num_blocks, tmp_path / str(num_blocks)) for num_blocks in (16, 32))
    for operation, few in once.items():
        many = twice[operation]
        ratio = sum(many.values()) / sum(few.values())
        assert ratio < 2.3, f"{operation}: {ratio:.2f} times the calls for twice the blocks"
        # A single quadratic function would hide in the sum.
        grown = {function: (few[function], number) for function, number in many.items() if function in few}
        quadratic = {function: pair for function, pair in grown.items() if pair[1] > max(200, 2.5 * pair[0])}
        assert not quadratic, f"{operation}: {quadratic}"
