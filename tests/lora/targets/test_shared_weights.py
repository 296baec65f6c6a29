"""Weights that two layers share are untied or adapted as one, never changed for one layer alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from lightning_lora import (
    ConfigError,
    LoRAConfig,
    LoRAMixin,
    count_parameters,
    inject_lora,
    load_adapter,
    lora_layers,
    merge_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from lightning_lora.callbacks import LoRAGuard
from lightning_lora.files.merge.merged_model import save_merged
from tests.support.tiny_models import TOKENS, gpt2, llama, logits, state_bytes, wake

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT warns that it does not share factors while it loads copies of them.
    pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings=True:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]

BUILDERS: dict[str, Callable[..., PreTrainedModel]] = {"llama": llama, "gpt2": gpt2}
WANTED = [{"adapt_head": True}, {"adapt_embeddings": True}, {"adapt_head": True, "adapt_embeddings": True}]


def tied(name: str) -> PreTrainedModel:
    return BUILDERS[name](tie_word_embeddings=True)


def adapted(name: str, **settings: Any) -> PreTrainedModel:
    model = tied(name)
    inject_lora(model, LoRAConfig(rank=4, **settings))
    wake(model)
    return model


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def is_tied(model: PreTrainedModel) -> bool:
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, nn.Module)
    return head.weight is table.weight


@pytest.mark.parametrize("wanted", WANTED, ids=str)
@pytest.mark.parametrize("way", ["untie", "both"])
@pytest.mark.parametrize("name", BUILDERS)
def test_the_merged_model_equals_the_adapter_model_in_memory_and_on_disk(
    name: str, way: str, wanted: dict[str, Any], tmp_path: Path
) -> None:
    model = tied(name)
    base = logits(model)
    inject_lora(model, LoRAConfig(rank=4, tied_weights=way, **wanted))
    assert is_tied(model) == (way == "both")
    assert torch.equal(logits(model), base)
    wake(model)
    changed, state = logits(model), state_bytes(model)
    save_merged(model, tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert is_tied(reloaded) == (way == "both")
    assert_near(logits(reloaded), changed)
    merge_lora(model)
    assert_near(logits(model), changed)
    unmerge_lora(model)
    assert state_bytes(model) == state
    remove_lora(model)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("wanted", WANTED, ids=str)
@pytest.mark.parametrize("way", ["untie", "both"])
@pytest.mark.parametrize("name", BUILDERS)
def test_the_adapter_loads_into_a_tied_base_here_and_in_peft(
    name: str, way: str, wanted: dict[str, Any], tmp_path: Path
) -> None:
    model = adapted(name, tied_weights=way, **wanted)
    save_adapter(model, tmp_path / "adapter")
    again = tied(name)
    load_adapter(again, tmp_path / "adapter")
    assert is_tied(again) == (way == "both")
    assert torch.equal(logits(again), logits(model))
    wanted_logits = logits(model)
    merge_lora(again)
    assert_near(logits(again), wanted_logits)
    theirs = peft.PeftModel.from_pretrained(tied(name), str(tmp_path / "adapter")).eval()
    assert_near(logits(theirs), wanted_logits)


@pytest.mark.parametrize("name", BUILDERS)
def test_the_config_of_an_untied_model_says_so(name: str, tmp_path: Path) -> None:
    model = adapted(name, tied_weights="untie", adapt_head=True)
    assert model.config.tie_word_embeddings is False
    remove_lora(model)
    model.tie_weights()
    assert not is_tied(model)
    model.save_pretrained(tmp_path / "untied")
    assert not is_tied(AutoModelForCausalLM.from_pretrained(tmp_path / "untied"))


def test_one_update_serves_both_and_counts_once() -> None:
    alone = count_parameters(adapted("llama"))
    both = count_parameters(adapted("llama", tied_weights="both", adapt_head=True, adapt_embeddings=True))
    assert both.adapter - alone.adapter == 4 * (64 + 32)
    assert both.adapter == both.trainable
    assert both.by_role["embedding" if "embedding" in both.by_role else "head"] == 4 * (64 + 32)


def test_the_shared_update_gets_the_gradient_of_both_uses() -> None:
    model: Any = adapted("llama", targets=["lm_head"], tied_weights="both").double()
    embed = lora_layers(model)["model.embed_tokens"]
    A, B = embed.lora_A, embed.lora_B
    tokens = TOKENS.clamp(min=1)  # the row of the padding token gets no gradient where it is looked up
    ours = torch.autograd.grad(model(tokens, labels=tokens).loss, (A, B))
    plain: Any = llama(tie_word_embeddings=True).double()
    weight = plain.lm_head.weight.detach() + embed.lora_spec.scale * (B @ A).T
    shared = {"model.embed_tokens.weight": weight, "lm_head.weight": weight}
    called = torch.func.functional_call(plain, shared, (tokens,), {"labels": tokens})
    for found, expected in zip(ours, torch.autograd.grad(called.loss, (A, B)), strict=True):
        torch.testing.assert_close(found, expected)


def test_an_encoder_decoder_shares_one_update_among_all_its_tables() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    sizes["decoder_start_token_id"] = 0
    model = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    inject_lora(model, LoRAConfig(rank=4, adapt_embeddings=True, tied_weights="both"))
    wake(model)
    with torch.no_grad():
        changed = model(input_ids=TOKENS, labels=TOKENS).logits
        merge_lora(model)
        assert_near(model(input_ids=TOKENS, labels=TOKENS).logits, changed)


def test_copies_share_among_themselves_only() -> None:
    model = adapted("llama", adapt_head=True, tied_weights="both")
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    assert twin.lm_head.lora_A is twin.model.embed_tokens.lora_A
    assert twin.lm_head.lora_A is not model.lm_head.lora_A


def test_an_excluded_partner_is_not_adapted_behind_the_users_back() -> None:
    config = LoRAConfig(rank=4, adapt_head=True, tied_weights="both", exclude=["embed_tokens"])
    with pytest.raises(ConfigError, match=r"'lm_head' shares its weight .* tied_weights='both' cannot be done here"):
        inject_lora(tied("llama"), config)


class Learner(LoRAMixin, LightningModule):
    lora = LoRAConfig(rank=4, adapt_head=True, adapt_embeddings=True, tied_weights="both")

    def __init__(self) -> None:
        super().__init__()
        self.model = tied("llama").train()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.lora_parameter_groups(1e-3))


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec.*deprecated")
@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:You.re resuming")
def test_a_shared_update_is_trained_checkpointed_and_resumed(tmp_path: Path) -> None:
    def trainer(steps: int) -> Trainer:
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return Trainer(max_steps=steps, accelerator="cpu", callbacks=[LoRAGuard()], enable_checkpointing=False, **quiet)

    rows = DataLoader(list(TOKENS), batch_size=1)  # type: ignore[arg-type]
    module = Learner()
    first = trainer(3)
    first.fit(module, rows)
    first.save_checkpoint(tmp_path / "a.ckpt")
    assert is_tied(module.model)
    again = Learner.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(logits(again.model.eval()), logits(module.model.eval()))
    resumed = Learner()
    trainer(5).fit(resumed, rows, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert not torch.equal(logits(resumed.model.eval()), logits(module.model))
