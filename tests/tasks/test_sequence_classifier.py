"""Classification: adapters on the body, the new head trained in full."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from lightning_lora import ConfigError, LoRAConfig, TargetNotFoundError, lora_layers
from lightning_lora.callbacks import LoRAGuard
from lightning_lora.tasks import SequenceClassifier
from tests.support import toys

pytestmark = [
    *toys.expected_warnings,
    pytest.mark.filterwarnings("ignore:Some weights of .* were not initialized"),
]

LORA = LoRAConfig(rank=2)


def class_loader(batch_size: int = 4, count: int = 12) -> Any:
    data: list[dict[str, Tensor]] = []
    for index, row in enumerate(toys.token_rows(count)):
        row = row | {"labels": torch.tensor(index % 3)}
        # The class is the first token, and rows are padded to different lengths.
        row["input_ids"][0] = 10 + index % 3
        row["attention_mask"][10 - index % 4 :] = 0
        data.append(row)
    return DataLoader(data, batch_size=batch_size)  # pyright: ignore[reportArgumentType]


def make(folder: Path, **options: Any) -> SequenceClassifier:
    return SequenceClassifier(str(folder), **({"num_labels": 3, "learning_rate": 1e-3, "lora": LORA} | options))


def fit(module: LightningModule, folder: Path, **options: Any) -> Trainer:
    runner = toys.trainer(folder, **options)
    runner.fit(module, class_loader(), class_loader(), weights_only=True)
    return runner


def test_head_is_trained_in_full_and_the_body_by_adapters(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder)
    module.configure_model()
    before = toys.snapshot(module)
    runner = fit(module, tmp_path, callbacks=[LoRAGuard()])
    changed = [name for name, tensor in toys.snapshot(module).items() if not torch.equal(tensor, before[name])]
    assert [name for name in changed if "lora_" not in name] == ["model.score.weight"]
    assert len(lora_layers(module)) == 14
    assert all(toys.moved(module))
    assert [(len(group["params"]), group["lr"]) for group in runner.optimizers[0].param_groups] == [
        (28, 1e-2),
        (1, 1e-3),
    ]


def test_loss_is_transformers_own(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder)
    (measured,) = toys.trainer(tmp_path).validate(module, class_loader(12), verbose=False)
    assert module.model is not None
    with torch.no_grad():
        output = module.model(**next(iter(class_loader(12))))
    assert measured["val_loss"] == pytest.approx(float(output.loss), rel=1e-6)
    labels = next(iter(class_loader(12)))["labels"]
    assert measured["val_accuracy"] == pytest.approx(float((output.logits.argmax(-1) == labels).float().mean()))


def test_measures_do_not_depend_on_how_rows_are_batched(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder)
    one, other = (toys.trainer(tmp_path).test(module, class_loader(size), verbose=False)[0] for size in (12, 5))
    assert one == pytest.approx(other, rel=1e-5)


def test_training_lowers_the_loss_and_prediction_gives_classes(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder, learning_rate=2e-3)
    before = toys.trainer(tmp_path).validate(module, class_loader(), verbose=False)[0]["val_loss"]
    fit(module, tmp_path, max_epochs=10)
    after = toys.trainer(tmp_path).validate(module, class_loader(), verbose=False)[0]
    assert after["val_loss"] < before - 0.03
    predicted: Any = toys.trainer(tmp_path).predict(module, class_loader())
    right = torch.cat(predicted) == torch.cat([batch["labels"] for batch in class_loader()])
    assert float(right.float().mean()) == pytest.approx(after["val_accuracy"])


def test_accumulated_steps_train_as_one_big_batch(llama_folder: Path, tmp_path: Path) -> None:
    states = []
    for batch_size, accumulate in ((12, 1), (5, 3)):
        torch.manual_seed(0)
        module = make(llama_folder, learning_rate=1e-4)
        runner = toys.trainer(tmp_path, accumulate_grad_batches=accumulate, max_epochs=2)
        runner.fit(module, class_loader(batch_size))
        states.append(toys.snapshot(module))
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_labels", [1, 0, -3, 2.0, "2", None, True])
def test_number_of_classes_is_checked(num_labels: Any, llama_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_labels must be a whole number of 2 or more, got"):
        make(llama_folder, num_labels=num_labels)


def test_wrong_target_is_refused(llama_folder: Path) -> None:
    with pytest.raises(TargetNotFoundError, match=r"'up_prj' matches none .* did you mean 'up_proj'"):
        make(llama_folder, lora={"rank": 2, "targets": ["up_prj"]})


def without_padding_in_the_config(folder: Path, copy: Path) -> Path:
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config["pad_token_id"] = None
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_padding_token_zero_is_taken_from_the_tokenizer(llama_folder: Path, tmp_path: Path) -> None:
    module = make(without_padding_in_the_config(llama_folder, tmp_path / "bare"))
    assert module.tokenizer.pad_token_id == 0
    assert module.model_config.pad_token_id == 0


def test_end_token_stands_in_for_a_missing_padding_token(llama_folder: Path, tmp_path: Path) -> None:
    folder = without_padding_in_the_config(llama_folder, tmp_path / "bare")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    module = make(folder)
    assert module.tokenizer.pad_token_id is None
    assert module.model_config.pad_token_id == module.tokenizer.eos_token_id


def test_full_fine_tuning_trains_everything(llama_folder: Path, tmp_path: Path) -> None:
    module = make(llama_folder, lora=None)
    runner = fit(module, tmp_path)
    (group,) = runner.optimizers[0].param_groups
    assert len(group["params"]) == len(list(module.parameters()))


def test_saved_adapter_carries_the_head(llama_folder: Path, tmp_path: Path) -> None:
    from lightning_lora import load_adapter

    module = make(llama_folder)
    fit(module, tmp_path)
    module.save_adapter(tmp_path / "adapter")
    config = AutoModelForSequenceClassification.from_pretrained(llama_folder, num_labels=3)
    load_adapter(config, tmp_path / "adapter")
    batch = next(iter(class_loader()))
    with torch.no_grad():
        expected = module.eval()(batch["input_ids"], batch["attention_mask"])
        found = config.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(found, expected)
