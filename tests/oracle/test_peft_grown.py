"""A grown adapter in PEFT, where several layers share one weight."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

from lightning_lora import LoRAConfig, inject_lora, save_adapter
from lightning_lora.lora.growth import grow_adapters
from tests.oracle.peft_models import peft_warnings
from tests.support import tiny_models

pytestmark = [*peft_warnings, pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")]


def test_a_head_that_shares_a_grown_weight_has_its_rank_in_peft(tmp_path: Path) -> None:
    model = tiny_models.llama(tie_word_embeddings=True)
    inject_lora(model, LoRAConfig(rank=2, adapt_embeddings=True, adapt_head=True, tied_weights="both"))
    tiny_models.wake(model)
    grow_adapters(model, {"model.embed_tokens": 4})
    tiny_models.wake(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_models.llama(tie_word_embeddings=True), tmp_path)
    torch.testing.assert_close(tiny_models.logits(theirs), tiny_models.logits(model), rtol=1e-5, atol=1e-5)
