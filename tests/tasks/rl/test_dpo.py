"""DPO: losses by hand from a second model, the reference at the start, and exact steps under accumulation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from lightning_lora import ConfigError, DataError, LoRAConfig, lora_layers
from lightning_lora.callbacks import BatchSizeMonitor, LoRAGuard
from lightning_lora.lora.adapter import disable_lora
from lightning_lora.tasks import DPO
from lightning_lora.tasks.rl import preference_loss
from tests.support import tiny_models, toys
from tests.tasks.rl import pairs

pytestmark = [*toys.expected_warnings, *toys.monitor_warnings]

LORA = LoRAConfig(rank=2)
GEMMA: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pairs.folder_of_llama(tmp_path_factory.mktemp("models"), attention_dropout=0.1)


def make(folder: str, **options: Any) -> DPO:
    module = DPO(folder, **({"learning_rate": 1e-3, "lora": LORA, "beta": 0.5} | options))
    module.configure_model()
    return module


def by_hand(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Log-probabilities of the answers, ``(pairs, 2)``, from whole logits, one row at a time without padding."""
    sums = []
    for side in range(2):
        for ids, mask, labels in zip(
            *(batch[name][:, side] for name in ("input_ids", "attention_mask", "labels")), strict=True
        ):
            length = int(mask.sum())
            logprobs = model(input_ids=ids[None, :length]).logits[0, :-1].log_softmax(-1)
            found = logprobs.gather(-1, ids[1:length, None]).squeeze(-1)
            sums.append((found * (labels[1:length] != -100)).sum())
    return torch.stack(sums).view(2, -1).T


LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "cDPO": {"label_smoothing": 0.1},
    "ipo": {"loss": "ipo"},
    "robust": {"loss": "robust", "label_smoothing": 0.2},
    "hinge": {"loss": "hinge"},
    "length_normalised": {"loss": "length_normalised"},
    "dpop with likelihood": {"loss": "dpop", "dpop_weight": 3.0, "nll_weight": 0.5},
}


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("head", ["plain", "adapted", "capped"])
def test_loss_and_gradients_are_those_of_two_models_and_whole_logits(
    options: dict[str, Any], head: str, folder: str, tmp_path: Path
) -> None:
    if head == "capped":  # logits that the model changes
        config = Gemma2Config(**GEMMA, vocab_size=pairs.VOCAB, final_logit_softcapping=2.0)
        Gemma2ForCausalLM(config).save_pretrained(folder := str(tmp_path / "gemma"))
    module = make(folder, lora=LoRAConfig(rank=2, adapt_head=head == "adapted"), reference="adapter_off", **options)
    tiny_models.wake(module, size=0.2)
    batch = next(iter(pairs.loader()))
    scores = module.score(batch)
    assert module._head_is_last is (head != "capped")
    policy = by_hand(module.model, batch)
    with torch.no_grad(), disable_lora(module.model):  # type: ignore[arg-type]
        reference = by_hand(module.model, batch)
    lengths = (batch["labels"] != -100).sum(-1)
    settings = {"kind": options.get("loss", "sigmoid")} | {k: v for k, v in options.items() if k != "loss"}
    expected = preference_loss(
        *policy.unbind(1), *reference.unbind(1), beta=0.5, **settings,
        chosen_lengths=lengths[:, 0], rejected_lengths=lengths[:, 1],
    )  # fmt: skip
    torch.testing.assert_close(scores.losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.rewards, 0.5 * (policy - reference).detach(), rtol=1e-4, atol=1e-5)
    trained = [p for p in module.parameters() if p.requires_grad]
    found, wanted = (torch.autograd.grad(losses.sum(), trained) for losses in (scores.losses, expected))
    for gradient, other in zip(found, wanted, strict=True):
        assert (gradient - other).norm() <= 1e-4 * other.norm() + 1e-7


class Starts(Callback):
    """What the first step says of policy and reference, before anything has changed."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0 and batch_idx == 0:
            self.rewards = pl_module.score(batch).rewards
            self.kind = pl_module.reference.kind


STARTS: dict[str, dict[str, Any]] = {
    "fresh": {},
    "with a norm in full": {"lora": LoRAConfig(rank=2, trainable=["norm"])},
    "with the head": {"lora": LoRAConfig(rank=2, adapt_head=True)},
    "loaded": {"awake": True},
    "loaded, with a norm in full": {"awake": True, "lora": LoRAConfig(rank=2, trainable=["norm"])},
    "in full": {"lora": None},
}


@pytest.mark.parametrize("options", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_policy_is_its_reference_at_the_start_and_not_later(
    options: dict[str, Any], precision: str, folder: str, tmp_path: Path
) -> None:
    options = dict(options)
    awake = options.pop("awake", False)
    runner = toys.trainer(tmp_path, precision=precision, callbacks=[start := Starts()], accumulate_grad_batches=3)
    module = DPO(folder, **({"learning_rate": 1e-2, "lora": LORA} | options))
    with runner.init_module():
        module.configure_model()
    if awake:
        tiny_models.wake(module, size=0.3)
        for name, parameter in module.named_parameters():
            if name.endswith("norm.weight"):
                parameter.data.mul_(1.5)  # trained in full beside the loaded adapter
    runner.fit(module, pairs.loader())
    expected = "precomputed" if module.lora is None else "frozen" if awake else "adapter_off"
    assert start.kind == expected
    if module.lora is None and precision == "bf16-mixed":
        # A product with a cast weight that needs a gradient is rounded in another order.
        assert start.rewards.abs().max() < 0.02
    else:
        assert not start.rewards.any()
    batch = next(iter(pairs.loader()))
    with torch.no_grad():
        assert module.score(batch).rewards.abs().min() > 0


def test_a_reference_that_is_a_frozen_copy_is_restored_bit_for_bit(folder: str, tmp_path: Path) -> None:
    module = make(folder)
    tiny_models.wake(module, size=0.3)
    at_start = {name: tensor.clone() for name, tensor in module.state_dict().items() if "lora_" in name}
    batch = next(iter(pairs.loader()))
    with torch.no_grad():
        expected = by_hand(module.model, batch)
    pairs.fit(module, tmp_path, pairs.loader(), max_epochs=2)
    trained = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    rows = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "labels")}
    torch.testing.assert_close(module._of_reference(rows).view(-1, 2), expected, rtol=1e-5, atol=1e-4)
    assert all(not torch.equal(trained[name], tensor) for name, tensor in at_start.items())
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in trained.items())


def test_precomputed_numbers_are_those_of_the_base_and_of_known_rows_only(folder: str, tmp_path: Path) -> None:
    module, base = make(folder, lora=None, learning_rate=1e-3), make(folder)
    pairs.fit(module, tmp_path, pairs.loader(count=6), pairs.loader(count=9))
    batch = next(iter(pairs.loader(batch_size=9)))
    with torch.no_grad():
        expected = by_hand(base.model, batch)
        rows = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "labels")}
        torch.testing.assert_close(module._of_reference(rows).view(-1, 2).float(), expected, rtol=1e-5, atol=1e-4)
        with pytest.raises(DataError, match="6 of 24 rows were in no training or validation data when the run began"):
            module.score(next(iter(pairs.loader(batch_size=12))))


def test_parameters_are_held_once(folder: str, tmp_path: Path) -> None:
    module = make(folder)
    pairs.fit(module, tmp_path, pairs.loader())
    base = tiny_models.llama()
    storages = {p.untyped_storage().data_ptr() for p in module.parameters()}
    adapters = sum(2 for _ in lora_layers(module))
    assert len(storages) == len(list(base.parameters())) + adapters
    assert not module.reference._frozen


@pytest.mark.parametrize("kind", ["sigmoid", "length_normalised"])
@pytest.mark.parametrize(("dtype", "rtol"), [("64-true", 1e-12), ("32-true", 1e-5)])
def test_accumulation_gives_the_step_of_one_batch(
    kind: str, dtype: Any, rtol: float, folder: str, tmp_path: Path
) -> None:
    """Also where the last window is short: 10 pairs in windows of 8."""
    found = []
    for size, windows in ((8, 1), (2, 4)):
        module = DPO(folder, 1e-3, LORA, loss=kind, nll_weight=0.3)
        runner = toys.trainer(tmp_path, precision=dtype, accumulate_grad_batches=windows)
        with runner.init_module():
            module.configure_model()
        tiny_models.wake(module, size=0.2)
        module.configure_optimizers = lambda module=module: torch.optim.SGD(  # type: ignore[method-assign]
            [p for p in module.parameters() if p.requires_grad], lr=0.1
        )
        runner.fit(module, pairs.loader(size, count=10))
        assert runner.global_step == 2
        found.append({name: p.detach() for name, p in module.named_parameters() if p.requires_grad})
    before = make(folder)
    tiny_models.wake(before, size=0.2)
    for name, parameter in found[0].items():
        start = dict(before.named_parameters())[name].detach().to(parameter.dtype)
        change, other = parameter - start, found[1][name] - start
        assert (change - other).norm() <= 100 * rtol * change.norm()
        torch.testing.assert_close(parameter, found[1][name], rtol=rtol, atol=rtol)


def test_weights_of_pairs_count_as_repetitions(folder: str, tmp_path: Path) -> None:
    weights = [2.0, 1.0, 1.0, 1.0]
    found = []
    for train in (
        pairs.loader(4, count=4, weights=weights),
        torch.utils.data.DataLoader([pairs.pair(number) for number in (0, 0, 1, 2, 3)], batch_size=5),  # type: ignore
    ):
        torch.manual_seed(0)
        module = make(folder)
        pairs.fit(module, tmp_path, train)
        found.append({name: p.detach() for name, p in module.named_parameters() if p.requires_grad})
    for name, parameter in found[0].items():
        torch.testing.assert_close(parameter, found[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:the margin grows because both answers get less likely")
def test_it_learns_and_logs_what_it_says(folder: str, tmp_path: Path) -> None:
    module = make(folder, learning_rate=3e-3)
    loader = pairs.loader()
    guard = LoRAGuard()
    runner = pairs.fit(module, tmp_path, loader, loader, max_epochs=6, callbacks=[guard, BatchSizeMonitor()])
    found = {name: float(value) for name, value in runner.callback_metrics.items()}
    names = {f"{stage}_{name}" for stage in ("train", "val") for name in ("loss", "margin", "accuracy")}
    names |= {f"{stage}_{side}_reward" for stage in ("train", "val") for side in ("chosen", "rejected")}
    assert names <= found.keys()
    with torch.no_grad():
        scored = [module.predict_step(batch, 0) for batch in loader]
    rows = {name: torch.cat([scores[name] for scores in scored]) for name in scored[0]}
    assert found["val_loss"] == pytest.approx(float(rows["loss"].mean()), rel=1e-5)
    assert found["val_margin"] == pytest.approx(float(rows["margin"].mean()), rel=1e-5)
    assert found["val_accuracy"] == pytest.approx(float((rows["margin"] > 0).float().mean()))
    difference = found["val_chosen_reward"] - found["val_rejected_reward"]
    assert found["val_margin"] == pytest.approx(difference, rel=1e-4)
    assert found["val_loss"] < math.log(2) - 0.1
    assert found["val_accuracy"] > 0.9


def test_the_monitor_counts_pairs(folder: str, tmp_path: Path) -> None:
    monitor = BatchSizeMonitor()
    monitor.warmup_steps = 0
    train = pairs.loader(2, count=32)
    pairs.fit(make(folder), tmp_path, train, accumulate_grad_batches=2, callbacks=[monitor])
    assert monitor.batch is not None
    assert monitor.batch.rows == 4
    assert monitor.estimate is not None
    assert monitor.estimate.value > 0


def test_before_training_nothing_is_preferred(folder: str, tmp_path: Path) -> None:
    module = make(folder)
    (found,) = toys.trainer(tmp_path).validate(module, pairs.loader(), verbose=False)
    assert found["val_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert found["val_accuracy"] == 0  # ties
    assert found["val_margin"] == 0


def test_chosen_answers_that_get_less_likely_are_told_once(folder: str, tmp_path: Path) -> None:
    module = make(folder, learning_rate=3e-2)
    with pytest.warns(UserWarning, match="both answers get less likely") as caught:
        pairs.fit(module, tmp_path, pairs.loader(), pairs.loader(), max_epochs=4)
    assert len([one for one in caught if "get less likely" in str(one.message)]) == 1


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "loss": ({"loss": "sigmod"}, "loss must be one of .* got 'sigmod'; did you mean 'sigmoid'"),
    "beta": ({"beta": -1.0}, "beta must be above 0, got -1.0"),
    "dropout": ({"lora": LoRAConfig(rank=2, dropout=0.1)}, "set lora.dropout to 0"),
    "reference": ({"reference": "frosen"}, "reference must be one of .* got 'frosen'; did you mean 'frozen'"),
    "its own reference": (
        {"reference": "adapter_off", "lora": None}, "'adapter_off' needs adapters, and lora=None .* its own reference",
    ),
    "a second model": ({"reference": "frozen", "lora": None}, "'frozen' needs adapters"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_settings_are_named(options: dict[str, Any], message: str, folder: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(folder, **options)


def test_dropout_of_the_model_is_off(folder: str) -> None:
    module = make(folder)
    assert module.model is not None
    assert module.model.config.attention_dropout == 0.0
