"""Reward models: scores at the last real token, the loss by hand, exact steps, and a head that is saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, LlamaForCausalLM

from lightning_lora import ConfigError, LoRAConfig, TargetNotFoundError
from lightning_lora.callbacks import LoRAGuard
from lightning_lora.tasks import RewardModel
from lightning_lora.tasks.rl import reward_model_loss
from tests.support import tiny_models, toys
from tests.tasks.rl import pairs

pytestmark = [*toys.expected_warnings, pytest.mark.filterwarnings("ignore:Some weights of .* were not initialized")]

LORA = LoRAConfig(rank=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pairs.folder_of_llama(tmp_path_factory.mktemp("models"))


def make(folder: str, **options: Any) -> RewardModel:
    torch.manual_seed(0)
    module = RewardModel(folder, **({"learning_rate": 1e-3, "lora": LORA} | options))
    module.configure_model()
    return module


def by_hand(module: RewardModel, batch: dict[str, Tensor]) -> Tensor:
    """Scores ``(pairs, 2)`` of rows without padding, one at a time."""
    model: Any = module.model
    scores = []
    for ids, mask in zip(batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1), strict=True):
        hidden = model.model(input_ids=ids[mask.bool()][None]).last_hidden_state
        scores.append(model.score(hidden[0, -1]))
    return torch.cat(scores).view(-1, 2)


@pytest.mark.parametrize("side", ["right", "left"])
def test_scores_are_read_at_the_last_real_token(side: str, folder: str) -> None:
    """Also where that token is the one that pads, as with a tokenizer that has no padding of its own."""
    module, batch = make(folder), next(iter(pairs.loader()))
    last = batch["attention_mask"].sum(-1) - 1
    batch["input_ids"].scatter_(-1, last[..., None], pairs.PAD)
    expected = by_hand(module, batch)
    if side == "left":
        shift = batch["attention_mask"].shape[-1] - 1 - last
        places = (torch.arange(pairs.LONGEST) - shift[..., None]) % pairs.LONGEST
        batch = {name: tensor.gather(-1, places) for name, tensor in batch.items()}
    ids, mask = (batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask"))
    torch.testing.assert_close(module(ids, mask).view(-1, 2), expected, rtol=1e-4, atol=1e-5)


def test_an_encoder_has_a_score_too(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=pairs.VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        num_labels=1,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    module, batch = make(str(tmp_path / "bert")), next(iter(pairs.loader()))
    ids, mask = (batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask"))
    assert module.model is not None
    module.model.eval()
    expected = module.model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    torch.testing.assert_close(module(ids, mask), expected)


@pytest.mark.parametrize("options", [{}, {"centre": 0.01}, {"margin": False}], ids=str)
def test_the_loss_is_bradley_terrys_with_the_margin_column(options: dict[str, Any], folder: str) -> None:
    module = make(folder, **options)
    batch = next(iter(pairs.loader(margin=[0.25 * number for number in range(12)])))
    found = module.predict_step(batch, 0)
    scores = by_hand(module, batch)
    margin = batch["margin"] if options.get("margin", True) else 0.0
    expected = reward_model_loss(*scores.unbind(1), margin=margin, centre=options.get("centre", 0.0))
    torch.testing.assert_close(found["loss"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["margin"], scores[:, 0] - scores[:, 1], rtol=1e-4, atol=1e-5)


def test_it_learns_saves_its_head_and_logs_what_it_says(folder: str, tmp_path: Path) -> None:
    module, loader = make(folder, learning_rate=3e-4), pairs.loader()
    runner = pairs.fit(module, tmp_path, loader, loader, max_epochs=12, callbacks=[LoRAGuard()])
    found = {name: float(value) for name, value in runner.callback_metrics.items()}
    assert {"train_loss", "train_accuracy", "train_margin"} <= found.keys()
    with torch.no_grad():
        scored = [module.predict_step(batch, 0) for batch in loader]
    rows = {name: torch.cat([scores[name] for scores in scored]) for name in scored[0]}
    assert found["val_loss"] == pytest.approx(float(rows["loss"].mean()), rel=1e-5)
    assert found["val_margin"] == pytest.approx(float(rows["margin"].mean()), rel=1e-5)
    assert found["val_accuracy"] == pytest.approx(float((rows["margin"] > 0).float().mean()))
    assert found["val_loss"] < math.log(2) - 0.1
    runner.save_checkpoint(tmp_path / "end.ckpt")
    again = RewardModel.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    (measured,) = toys.trainer(tmp_path).validate(again, loader, verbose=False)
    assert measured["val_loss"] == pytest.approx(found["val_loss"], rel=1e-6)


def test_a_tie_is_no_win(folder: str, tmp_path: Path) -> None:
    module = make(folder)
    assert module.model is not None
    module.model.score.weight.data.zero_()  # pyright: ignore
    (found,) = toys.trainer(tmp_path).validate(module, pairs.loader(), verbose=False)
    assert found["val_accuracy"] == 0
    assert found["val_loss"] == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize(("dtype", "rtol"), [("64-true", 1e-12), ("32-true", 1e-5)])
def test_accumulation_gives_the_step_of_one_batch(dtype: Any, rtol: float, folder: str, tmp_path: Path) -> None:
    """Also where the last window is short: 10 pairs in windows of 8."""
    found = []
    for size, windows in ((8, 1), (2, 4)):
        runner = toys.trainer(tmp_path, precision=dtype, accumulate_grad_batches=windows)
        with runner.init_module():
            module = make(folder)
        tiny_models.wake(module, size=0.2)
        module.configure_optimizers = lambda module=module: torch.optim.SGD(  # type: ignore[method-assign]
            [p for p in module.parameters() if p.requires_grad], lr=0.1
        )
        runner.fit(module, pairs.loader(size, count=10))
        found.append({name: p.detach() for name, p in module.named_parameters() if p.requires_grad})
    for name, parameter in found[0].items():
        assert (parameter - found[1][name]).norm() <= 5 * rtol * parameter.norm()


def test_bad_settings_are_named(folder: str) -> None:
    with pytest.raises(ConfigError, match="centre must be a finite number of at least 0, got -1"):
        make(folder, centre=-1)
    with pytest.raises(TargetNotFoundError, match="'q_prj' matches none"):
        make(folder, lora=LoRAConfig(rank=2, targets=["q_prj"]))


def test_a_language_model_is_its_body(folder: str) -> None:
    """The folder holds a causal language model; only the new head is random."""
    module = make(folder)
    assert module.model is not None
    body = LlamaForCausalLM.from_pretrained(folder).model.state_dict()
    ours = {name.removeprefix("model."): tensor for name, tensor in module.model.state_dict().items()}
    assert all(torch.equal(ours[name], tensor) for name, tensor in body.items())
