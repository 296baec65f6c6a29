"""Evaluations of rows that neither batch size nor ranks divide, on two ranks: ``python uneven_rows.py FOLDER``.

What was logged goes to ``RANK.pt``. On one rank, call `measured`; `expected` computes the same row by row.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets.config
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import LlamaForCausalLM

from lightning_lora import LoRAConfig, disable_lora, lora_layers
from lightning_lora.data import PreferenceDataModule, PromptDataModule, SFTDataModule
from lightning_lora.sharding import FSDP2Strategy
from lightning_lora.tasks import DPO, CausalLM, PolicyGradient, RewardModel
from tests.support import toys

STRATEGIES: dict[str, Callable[[], Any]] = {"ddp": lambda: "ddp", "fsdp2": FSDP2Strategy}
BATCHES = {"answers": (1, 2), "weights": (2,), "pairs": (1, 2), "scores": (2,), "prompts": (1, 2)}
"""Rows of a batch on two ranks. One rank has 5 of 9 rows, the other one 4; and 3 of 5 pairs or prompts, and 2."""
ROWS = [{"question": "what is " + "0123"[: n % 4], "answer": "5" * (1 + n * 2 % 5) + str(n)} for n in range(9)]
PAIRS = [{"prompt": "sum " + "a" * n, "chosen": "well " * (1 + n % 3), "rejected": "two " * (1 + n)} for n in range(5)]


def long_texts(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
    """A reward that differs between prompts."""
    return [float(len(prompt) + len(text)) for prompt, text in zip(prompts, completions, strict=True)]


def write(folder: Path) -> None:
    """The model, and the rows of each task."""
    toys.save_llama(folder / "llama")
    model = LlamaForCausalLM.from_pretrained(folder / "llama")
    # So that a token is mostly followed by itself, and some tokens of an answer are foreseen.
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data.mul_(50))
    model.save_pretrained(folder / "llama")
    weighted = [row | {"weight": 0.5 + n} for n, row in enumerate(ROWS)]
    prompts = [{"prompt": row["prompt"]} for row in PAIRS]
    for name, rows in {"answers": ROWS, "weights": weighted, "pairs": PAIRS, "prompts": prompts}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def module_of(name: str, folder: Path) -> LightningModule:
    kind, settings = {
        "answers": (CausalLM, {}),
        "weights": (CausalLM, {}),
        "pairs": (DPO, {"beta": 0.5, "reference": "adapter_off"}),
        "scores": (RewardModel, {}),
        "prompts": (PolicyGradient, {"reward": long_texts, "reward_workers": 0, "max_new_tokens": 4}),
    }[name]

    class Trained(kind):
        def apply_lora(self) -> None:
            """Everything that trains has values other than those of the base, the same on every rank."""
            is_new = not lora_layers(self)
            super().apply_lora()
            generator = torch.Generator().manual_seed(3)
            for parameter in self.parameters():
                if is_new and parameter.requires_grad:
                    parameter.data.normal_(0, 0.1, generator=generator)

    # So small a rate leaves every weight as it is.
    return Trained(str(folder / "llama"), learning_rate=1e-30, lora=LoRAConfig(rank=2), **settings)


def data_of(name: str, folder: Path, batch_size: int) -> Any:
    kind = {"pairs": PreferenceDataModule, "scores": PreferenceDataModule, "prompts": PromptDataModule}
    file = str(folder / f"{'pairs' if name == 'scores' else name}.jsonl")
    return kind.get(name, SFTDataModule)(file, file, file, batch_size, tokenizer=str(folder / "llama"))


def measured(name: str, folder: Path, batch_size: int, **options: Any) -> dict[str, dict[str, float]]:
    """What is logged by ``validate``, by ``test``, and by ``fit`` after it."""
    runner = toys.trainer(folder, limit_train_batches=1, num_sanity_val_steps=1, **options)
    module, data = module_of(name, folder), data_of(name, folder, batch_size)
    found = {"validate": runner.validate(module, data, verbose=False)[0]}
    found["test"] = {
        key.replace("test_", "val_"): value for key, value in runner.test(module, data, verbose=False)[0].items()
    }
    if name != "prompts":
        runner = toys.trainer(folder, limit_train_batches=1, num_sanity_val_steps=1, **options | renewed(options))
        runner.fit(module, datamodule=data)
        found["fit"] = {key: float(runner.callback_metrics[key]) for key in found["validate"]}
    # A completion that is drawn depends on the random numbers of its rank.
    return {fn: {key: value for key, value in metrics.items() if key != "val_reward"} for fn, metrics in found.items()}


def renewed(options: dict[str, Any]) -> dict[str, Any]:
    """A strategy of its own for another Trainer."""
    return {"strategy": type(options["strategy"])()} if isinstance(options.get("strategy"), FSDP2Strategy) else {}


@torch.no_grad()
def expected(name: str, folder: Path) -> dict[str, float]:
    """The same over all rows at once, each of them alone in its batch, without a data loader, in float64."""
    module, data = module_of(name, folder), data_of(name, folder, 1)
    module.configure_model()
    module.eval()
    data.setup("test")
    if name == "prompts":
        return {"val_reward_greedy": _mean([_greedy_reward(module, row) for row in data.rows["test"]])}
    rows: Any = data.rows["test"].with_format("torch")
    if name in ("answers", "weights"):
        return _of_tokens(module, list(rows))
    pairs = [(rows[2 * n], rows[2 * n + 1]) for n in range(len(rows) // 2)]
    if name == "scores":
        margins = [_score(module, chosen) - _score(module, rejected) for chosen, rejected in pairs]
        return _of_margins(margins) | {"val_margin": _mean(margins)}
    rewards = [[0.5 * _log_ratio(module, row) for row in pair] for pair in pairs]
    margins = [chosen - rejected for chosen, rejected in rewards]
    by_side = dict(
        zip(("val_chosen_reward", "val_rejected_reward"), map(_mean, zip(*rewards, strict=True)), strict=True)
    )
    return _of_margins(margins) | {"val_margin": _mean(margins)} | by_side


def _of_tokens(module: Any, rows: list[Any]) -> dict[str, float]:
    losses, right, weights = [], [], []
    for row in rows:
        logits, ids = module(row["input_ids"][None])[0, :-1].double(), row["input_ids"][1:]
        trained = row["supervised"][1:].bool()
        losses.append(F.cross_entropy(logits, ids, reduction="none")[trained])
        right.append((logits.argmax(-1) == ids)[trained].double())
        weights.append(torch.full_like(losses[-1], float(row["weight"])))
    weight = torch.cat(weights)
    loss, accuracy = (float((torch.cat(each) * weight).sum() / weight.sum()) for each in (losses, right))
    return {"val_loss": loss, "val_perplexity": float(torch.tensor(loss).exp()), "val_accuracy": accuracy}


def _of_margins(margins: list[float]) -> dict[str, float]:
    return {
        "val_loss": _mean([float(F.softplus(torch.tensor(-margin, dtype=torch.float64))) for margin in margins]),
        "val_accuracy": _mean([float(margin > 0) for margin in margins]),
    }


def _mean(numbers: Any) -> float:
    return sum(numbers) / len(numbers)


def _score(module: Any, row: Any) -> float:
    return float(module(row["input_ids"][None]))


def _log_ratio(module: Any, row: Any) -> float:
    with disable_lora(module):
        base = _logprob(module, row)
    return _logprob(module, row) - base


def _logprob(module: Any, row: Any) -> float:
    logprobs = module(row["input_ids"][None])[0, :-1].double().log_softmax(-1)
    return float(logprobs.gather(-1, row["input_ids"][1:, None])[row["supervised"][1:].bool()].sum())


def _greedy_reward(module: Any, row: Any) -> float:
    tokens: list[int] = []
    stops = module.model.generation_config.eos_token_id
    while len(tokens) < 4 and not (tokens and tokens[-1] in (stops if isinstance(stops, list) else [stops])):
        tokens.append(int(module(torch.tensor([[*row.input_ids, *tokens]]))[0, -1].argmax()))
    return long_texts([row.prompt], [module.trained_tokenizer.decode(tokens, skip_special_tokens=True)])[0]


class Foreign(toys.Toy):
    """A module of a user, which notes the rows that its rank is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.seen += batch[0][:, 0].tolist()


def foreign(folder: Path, rows: int, **options: Any) -> tuple[list[float], list[str]]:
    """What this rank is shown of so many rows in the validation of a fit, and what is said of repeated rows."""
    module = Foreign()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        runner = toys.trainer(folder, devices=2, strategy="ddp", **options)
        runner.fit(module, toys.loader(4), toys.loader(rows))
    return module.seen, [str(each.message) for each in heard if "rows are evaluated as" in str(each.message)]


def main(folder: Path) -> None:
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        found = {
            (strategy, name, batch_size): measured(name, folder, batch_size, devices=2, strategy=make())
            for strategy, make in STRATEGIES.items()
            for name, sizes in BATCHES.items()
            for batch_size in sizes
        }
    lightning = [str(each.message) for each in heard if "rows are evaluated as" in str(each.message)]
    lightning += [str(each.message) for each in heard if "replicates some samples" in str(each.message)]
    told = {rows: foreign(folder, rows) for rows in (8, 9)} | {"few": foreign(folder, 9, limit_val_batches=1)}
    torch.save((found, lightning, told), folder / f"{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
