"""Supervised fine-tuning of a causal language model: the loss, the rates, the refusals, and what may change."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_lora import ConfigError, LoRAConfig, TargetNotFoundError, lora_layers
from lightning_lora.callbacks import LoRAGuard
from lightning_lora.mixin.optim import ADAPTER_EPS
from lightning_lora.tasks import CausalLM
from tests.support import toys

pytestmark = toys.expected_warnings

LORA = LoRAConfig(rank=2)


def token_loader(batch_size: int = 2, count: int = 8) -> Any:
    return DataLoader(toys.token_rows(count), batch_size=batch_size)  # pyright: ignore[reportArgumentType]


def make(folder: Path, **options: Any) -> CausalLM:
    return CausalLM(str(folder), **({"learning_rate": 2e-3, "lora": LORA} | options))


def fit(module: LightningModule, folder: Path, **options: Any) -> Trainer:
    ckpt_path = options.pop("ckpt_path", None)
    validation = options.pop("validation", None)
    runner = toys.trainer(folder, **options)
    runner.fit(module, token_loader(), validation, ckpt_path=ckpt_path, weights_only=True)
    return runner


class Record(Callback):
    """The base as it was, and the learning rates of every step."""

    def __init__(self) -> None:
        self.base: dict[str, torch.Tensor] = {}
        self.rates: list[tuple[float, ...]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.base = toys.base_of(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.rates.append(tuple(group["lr"] for group in optimizer.param_groups))


def test_loss_is_transformers_own(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder)
    batch = next(iter(token_loader(8)))
    runner = toys.trainer(tmp_path)
    (measured,) = runner.validate(module, token_loader(8), verbose=False)
    reference = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    with torch.no_grad():
        loss = reference(**batch).loss
    assert measured["val_loss"] == pytest.approx(float(loss), rel=1e-6)
    assert measured["val_perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)


def test_loss_does_not_depend_on_how_rows_are_batched(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder)
    losses = [
        toys.trainer(tmp_path).test(module, token_loader(size), verbose=False)[0]["test_loss"] for size in (1, 3, 8)
    ]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)


def test_training_moves_every_adapter_and_not_one_bit_of_the_base(llama_folder: Path, tmp_path: Path) -> None:
    module, record = make(llama_folder), Record()
    runner = fit(
        module,
        tmp_path,
        max_epochs=2,
        callbacks=[record, LoRAGuard()],
        validation=token_loader(),
        num_sanity_val_steps=1,
    )
    assert len(lora_layers(module)) == 14
    assert all(toys.moved(module))
    assert toys.same(record.base, toys.base_of(module))
    assert runner.callback_metrics.keys() >= {"train_loss", "val_loss", "val_perplexity", "val_accuracy"}


def test_training_lowers_the_loss(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder, learning_rate=1e-3, lora=LoRAConfig(rank=8))
    before = toys.trainer(tmp_path).validate(module, token_loader(), verbose=False)[0]["val_loss"]
    fit(module, tmp_path, max_epochs=10)
    after = toys.trainer(tmp_path).validate(module, token_loader(), verbose=False)[0]["val_loss"]
    assert after < before - 0.03


def test_accumulated_steps_train_as_one_big_batch(llama_folder: Path, tmp_path: Path) -> None:
    states = []
    for batch_size, accumulate in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        module = make(llama_folder, learning_rate=1e-4)
        runner = toys.trainer(tmp_path, accumulate_grad_batches=accumulate, max_epochs=3, gradient_clip_val=1.0)
        runner.fit(module, token_loader(batch_size))
        states.append(toys.snapshot(module))
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_row_without_supervised_tokens_gives_no_nan(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder)
    data = toys.token_rows(4)
    for row in data[:2]:
        row["labels"].fill_(-100)
    rows: Any = DataLoader(data, batch_size=1)  # pyright: ignore[reportArgumentType]
    toys.trainer(tmp_path, accumulate_grad_batches=2).fit(module, rows, rows)
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())
    predicted = toys.trainer(tmp_path).predict(module, rows)
    assert predicted is not None
    assert [float(part["loss"]) for part in predicted[:2]] == [0.0, 0.0]  # pyright: ignore


def test_prediction_gives_each_rows_loss_and_tokens(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder)
    (predicted,) = toys.trainer(tmp_path).predict(module, token_loader(8)) or []
    labels = next(iter(token_loader(8)))["labels"][:, 1:]
    assert predicted["tokens"].tolist() == (labels != -100).sum(-1).tolist()  # pyright: ignore
    (measured,) = toys.trainer(tmp_path).test(module, token_loader(8), verbose=False)
    mean = (predicted["loss"] * predicted["tokens"]).sum() / predicted["tokens"].sum()  # pyright: ignore
    assert measured["test_loss"] == pytest.approx(float(mean), rel=1e-5)


def test_adapters_learn_at_ten_times_the_rate(llama_folder: Path, tmp_path: Path) -> None:
    module, record = make(llama_folder, learning_rate=2e-3), Record()
    runner = fit(module, tmp_path, callbacks=[record])
    assert record.rates == [(2e-2,)] * 4
    (group,) = runner.optimizers[0].param_groups
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.9, 0.95), 0.0, ADAPTER_EPS)
    full = make(llama_folder, lora=None, weight_decay=0.1)
    runner = fit(full, tmp_path)
    (group,) = runner.optimizers[0].param_groups
    assert (group["lr"], group["weight_decay"]) == (2e-3, 0.1)
    assert len(group["params"]) == len(list(full.parameters()))


def test_modules_trained_in_full_learn_at_the_rate_itself(llama_folder: Path, tmp_path: Path) -> None:
    module, record = make(llama_folder, lora=LoRAConfig(rank=2, trainable=["model.norm"])), Record()
    fit(module, tmp_path, callbacks=[record])
    assert record.rates == [(2e-2, 2e-3)] * 4


@pytest.mark.parametrize(
    ("schedule", "warmup", "shape"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("constant", 2, [0, 0.5, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("linear", 2, [0, 0.5, 1, 0.5]),
        ("cosine", 0, [1, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_schedules(schedule: str, warmup: int, shape: list[float], llama_folder: Path, tmp_path: Path) -> None:
    module, record = make(llama_folder, schedule=schedule, warmup_steps=warmup), Record()
    fit(module, tmp_path, callbacks=[record])
    assert [rate for (rate,) in record.rates] == pytest.approx([2e-2 * part for part in shape])


def test_schedule_counts_optimizer_steps_not_micro_batches(llama_folder: Path, tmp_path: Path) -> None:
    module, record = make(llama_folder, schedule="linear"), Record()
    fit(module, tmp_path, callbacks=[record], accumulate_grad_batches=2)
    assert [rate for (rate,) in record.rates] == pytest.approx([2e-2, 1e-2])


def test_warm_up_longer_than_the_run_warns(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder, warmup_steps=10)
    with pytest.warns(UserWarning, match="warmup_steps=10, but the run has 4 steps: it never leaves warm-up"):
        fit(module, tmp_path)


def test_dry_run_with_warm_up_passes_the_guard(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder, warmup_steps=1)
    with pytest.warns(UserWarning, match="it never leaves warm-up"):
        fit(module, tmp_path, fast_dev_run=True, callbacks=[LoRAGuard()])


BAD = [
    ({"learning_rate": float("nan")}, "learning_rate must be a finite number greater than 0, got nan"),
    ({"learning_rate": 0}, "learning_rate must be a finite number greater than 0, got 0"),
    ({"learning_rate": -1e-4}, "learning_rate must be a finite number greater than 0, got -0.0001"),
    ({"learning_rate": float("inf")}, "learning_rate must be a finite number greater than 0, got inf"),
    ({"learning_rate": "1e-4"}, "learning_rate must be a finite number greater than 0, got '1e-4'"),
    ({"weight_decay": -0.1}, "weight_decay must be a finite number of at least 0, got -0.1"),
    ({"weight_decay": float("nan")}, "weight_decay must be a finite number of at least 0, got nan"),
    ({"weight_decay": float("inf")}, "weight_decay must be a finite number of at least 0, got inf"),
    ({"warmup_steps": -1}, "warmup_steps must be an integer of at least 0, got -1"),
    ({"warmup_steps": 0.1}, "warmup_steps must be an integer of at least 0, got 0.1"),
    ({"warmup_steps": True}, "warmup_steps must be an integer of at least 0, got True"),
    ({"schedule": "cosin"}, "schedule must be one of constant, linear, cosine, got 'cosin'; did you mean 'cosine'?"),
    ({"dtype": "bf16"}, "dtype must be one of float32, bfloat16, float16, got 'bf16'"),
    ({"lora": {"rank": 0}}, "rank must be at least 1, got 0"),
    ({"lora": "all"}, "lora must be a LoRAConfig, a mapping or None, got str"),
    ({"model": "./nowhere"}, "model './nowhere' is not a folder on this machine"),
    ({"model": "/no/such/model"}, "model '/no/such/model' is not a folder on this machine"),
    ({"model": "a/b/c"}, "model 'a/b/c' is not a folder on this machine"),
    ({"model": ""}, "model '' cannot be used: "),
]


@pytest.mark.parametrize(("options", "text"), BAD, ids=[str(options) for options, _ in BAD])
def test_bad_argument_is_refused_when_the_module_is_made(
    options: dict[str, Any], text: str, llama_folder: Path
) -> None:
    arguments: dict[str, Any] = {"model": str(llama_folder)} | options
    with pytest.raises(ConfigError) as caught:
        CausalLM(**arguments)
    assert text in str(caught.value)


def test_unknown_hub_name_is_refused_with_what_to_give_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match=r"^model 'nobody/no-such-model' cannot be used: .*, or a hub name\. It is not on"
    ):
        CausalLM("nobody/no-such-model")


def test_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be used: .*Give a folder with config.json"):
        CausalLM(str(tmp_path))


@pytest.fixture
def corrupt_folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A model whose weights cannot be read."""
    folder = tmp_path / "corrupt"
    shutil.copytree(llama_folder, folder)
    (folder / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00 not json at all")
    return folder


def test_wrong_target_is_refused_before_any_weight_is_read(corrupt_folder: Path) -> None:
    with pytest.raises(TargetNotFoundError, match=r"'q_prj' matches none of the 16 .* did you mean 'q_proj'"):
        make(corrupt_folder, lora=LoRAConfig(rank=2, targets=["q_prj"]))


def test_unreadable_weights_are_refused_by_name(corrupt_folder: Path, tmp_path: Path) -> None:
    module = make(corrupt_folder)
    with pytest.raises(ConfigError, match=r"the weights of .*corrupt' cannot be read: .*Only safetensors files"):
        fit(module, tmp_path)


def test_pickled_weights_are_not_read(llama_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(llama_folder, folder)
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"cannot be read: .*Only safetensors files are loaded"):
        fit(make(folder), tmp_path)


@pytest.mark.parametrize(
    ("dtype", "precision", "expected"),
    [
        (None, "32-true", torch.float32),
        (None, "bf16-true", torch.bfloat16),
        ("bfloat16", "bf16-mixed", torch.bfloat16),
        ("bfloat16", "32-true", torch.bfloat16),
    ],
)
def test_base_type_and_wide_adapters(
    dtype: str | None, precision: Any, expected: torch.dtype, llama_folder: Path, tmp_path: Path
) -> None:
    module, record = make(llama_folder, dtype=dtype), Record()
    fit(module, tmp_path, precision=precision, callbacks=[record, LoRAGuard()])
    for layer in lora_layers(module).values():
        assert (layer.weight.dtype, layer.lora_A.dtype, layer.lora_B.dtype) == (expected, torch.float32, torch.float32)
    assert toys.same(record.base, toys.base_of(module))


RELOAD = """
import sys, torch, warnings
warnings.simplefilter("error")
from lightning_lora.tasks import CausalLM
module = CausalLM.load_from_checkpoint(sys.argv[1], weights_only=True)
torch.save(module.state_dict(), sys.argv[2])
"""


def test_reload_in_a_fresh_process(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder)
    fit(module, tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert len(kept) == 28
    assert all("lora_" in name for name in kept)
    toys.run_python(RELOAD, tmp_path / "a.ckpt", tmp_path / "state.pt")
    assert toys.same(toys.snapshot(module), torch.load(tmp_path / "state.pt", weights_only=True))


def test_resuming_equals_the_uninterrupted_run(llama_folder: Path, tmp_path: Path) -> None:
    whole, half, resumed = (make(llama_folder, schedule="cosine", warmup_steps=1) for _ in range(3))
    torch.manual_seed(0)
    fit(whole, tmp_path, max_epochs=2)
    torch.manual_seed(0)

    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = True

    fit(half, tmp_path, max_epochs=2, callbacks=[Stop()]).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, tmp_path, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert toys.same(toys.snapshot(whole), toys.snapshot(resumed))


def test_full_fine_tuning_is_the_same_module_without_lora(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder, lora=None)
    runner = fit(module, tmp_path, callbacks=[LoRAGuard()])
    runner.save_checkpoint(tmp_path / "full.ckpt")
    kept = torch.load(tmp_path / "full.ckpt", weights_only=True)["state_dict"]
    assert kept.keys() == module.state_dict().keys()
    loaded = CausalLM.load_from_checkpoint(tmp_path / "full.ckpt", weights_only=True)
    assert toys.same(toys.snapshot(module), toys.snapshot(loaded))


def test_vocabulary_and_tokenizer_come_from_the_model(llama_folder: Path) -> None:
    module = make(llama_folder)
    assert module.vocab_size == len(module.tokenizer)


def test_missing_tokenizer_is_named(llama_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(llama_folder / name, tmp_path / name)
    with pytest.raises(ConfigError, match="there is no usable tokenizer beside model"):
        _ = make(tmp_path).tokenizer


def test_a_folder_that_lacks_weights_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "incomplete"
    shutil.copytree(llama_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("up_proj.weight"))
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != lost},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ConfigError, match=f"lacks 1 weights.*{lost}"):
        CausalLM(str(folder)).configure_model()
