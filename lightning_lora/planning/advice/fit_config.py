"""The settings of ``fit`` for a plan, from those that the user gave or from the objects themselves."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_lora.data import SFTDataModule
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.planning.advice.config_file import class_settings, plain, without_defaults
from lightning_lora.planning.advice.method import Method, strategy_setting
from lightning_lora.planning.reason import Reason
from lightning_lora.tasks.pretrained import PretrainedTask

Settings = dict[str, Any]


def fit_config(
    module: LightningModule,
    data: LightningDataModule,
    config: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    method: Method,
    lora: LoRAConfig,
    trainer: Mapping[str, Any],
    topics: Sequence[tuple[str, Reason]],
    planned: Mapping[str, Any] | None = None,
) -> tuple[Settings | None, dict[str, Reason]]:
    """The settings of ``fit``, and the reasons by dotted name.

    Args:
        module: The module that is planned.
        data: Its data module.
        config: ``model``, ``data`` and ``trainer`` as a config names them; None if they came as objects.
        settings: `Plan.settings`.
        method: The recommended method.
        lora: The LoRA settings.
        trainer: Settings of the Trainer that the user gave.
        topics: Reasons of the plan.
        planned: Arguments of the callback that prints the plan beside what was measured; None for no callback.

    Returns:
        The settings, or None if the arguments of an object are not known.
    """
    parts = config or _from_objects(module, data)
    if parts is None or not all(isinstance(each, Mapping) for each in callbacks_of(trainer)):
        return None, {}
    made: Settings = {"seed_everything": parts.get("seed_everything", 0)}
    reasons: dict[str, Reason] = {}
    why = {topic: [reason for each, reason in topics if each == topic] for topic in ("method", "settings")}
    model = plain(parts["model"])
    made["model"] = _model(model, module, settings, method, lora, reasons, why)
    made["data"] = _data(plain(parts["data"]), data, settings, reasons, why["settings"])
    made["trainer"] = _trainer({**plain(parts.get("trainer") or {}), **trainer}, settings, method, reasons, why)
    if not isinstance(module, PretrainedTask) and not hasattr(module, "lora"):
        config = None
        if method.rank is not None:
            config = plain(without_defaults(LoRAConfig, vars(lora) | {"rank": method.rank})) | {"rank": method.rank}
        _set_callback(made["trainer"], "lightning_lora.callbacks.LoRA", config and {"config": config})
        reasons["trainer.callbacks"] = why["method"][0]
    if planned is not None:
        _set_callback(made["trainer"], "lightning_lora.callbacks.PlannedRun", dict(planned))
        reasons["trainer.callbacks"] = Reason("callbacks", "fit prints the plan beside what it measured", "this plan")
    return made, reasons


def _set_callback(trainer: Settings, path: str, arguments: Settings | None) -> None:
    """Give the callback of this class its arguments, in its place if there is one; None takes it away."""
    callbacks, kind = trainer.get("callbacks") or [], path.rpartition(".")[2]
    found = [n for n, each in enumerate(callbacks) if each["class_path"].rpartition(".")[2] == kind]
    if arguments is None:
        kept = [each for n, each in enumerate(callbacks) if n not in found]
    elif found:
        first = callbacks[found[0]]
        changed = {**first, "init_args": {**(first.get("init_args") or {}), **arguments}}
        kept = [changed if n == found[0] else each for n, each in enumerate(callbacks) if n not in found[1:]]
    else:
        kept = [*callbacks, {"class_path": path, "init_args": arguments}]
    trainer["callbacks"] = kept
    if not kept:
        del trainer["callbacks"]


def callbacks_of(trainer: Mapping[str, Any]) -> list[Any]:
    """The callbacks of settings of a Trainer, as objects or as a config names them."""
    callbacks = trainer.get("callbacks") or []
    return callbacks if isinstance(callbacks, list) else [callbacks]


def _model(
    model: Settings,
    module: LightningModule,
    settings: Mapping[str, Any],
    method: Method,
    lora: LoRAConfig,
    reasons: dict[str, Reason],
    why: Mapping[str, Sequence[Reason]],
) -> Settings:
    init = _arguments(model)
    if settings["learning_rate"] is not None and "learning_rate" in inspect.signature(type(module)).parameters:
        init["learning_rate"] = settings["learning_rate"]
        reasons["model.init_args.learning_rate"] = why["settings"][0]
    if isinstance(module, PretrainedTask) or hasattr(module, "lora"):
        own = plain(without_defaults(LoRAConfig, vars(lora)))
        init["lora"] = None if method.rank is None else own | {"rank": method.rank, "alpha": lora.alpha}
        reasons["model.init_args.lora"] = why["method"][-1]
    if isinstance(module, PretrainedTask) and (method.name == "qlora" or init.get("quantization")):
        init["quantization"] = "nf4" if method.name == "qlora" else None
        reasons["model.init_args.quantization"] = why["method"][0]
    return model


def _data(
    settings: Settings,
    data: LightningDataModule,
    planned: Mapping[str, Any],
    reasons: dict[str, Reason],
    why: Sequence[Reason],
) -> Settings:
    if isinstance(getattr(data, "batch_size", None), int):
        _arguments(settings)["batch_size"] = planned["batch_size"]
        told = f"{planned['batch_size']} rows of a micro-batch"
        reason = Reason(told, "the most that fit and divide the rows of a step", "traced")
        reasons["data.init_args.batch_size" if "class_path" in settings else "data.batch_size"] = reason
    return settings


def _trainer(
    trainer: Settings,
    planned: Mapping[str, Any],
    method: Method,
    reasons: dict[str, Reason],
    why: Mapping[str, Sequence[Reason]],
) -> Settings:
    kept = {name: value for name, value in trainer.items() if value is not None}
    made = without_defaults(Trainer, kept)
    if "max_epochs" not in made and "max_steps" not in made:
        made["max_epochs"] = 1
    made.pop("strategy", None)
    made |= {"accumulate_grad_batches": planned["accumulate_grad_batches"], "devices": planned["devices"]}
    made |= {"precision": planned["precision"], "strategy": strategy_setting(method.strategy)}
    callbacks = made.get("callbacks")
    if callbacks is not None and not isinstance(callbacks, list):
        made["callbacks"] = [callbacks]
    rows = next((reason for reason in why["settings"] if "rows per step" in reason.value), why["settings"][-1])
    reasons["trainer.accumulate_grad_batches"] = rows
    where = Reason(f"{planned['devices']} devices", "those that were named, or are here", "this plan")
    fits = Reason(method.strategy, "the first strategy in whose memory the method fits", "traced")
    types = Reason(
        planned["precision"], "yours; without any bf16 on a GPU, with adapters in float32", "arXiv 2305.14314"
    )
    reasons |= {"trainer.devices": where, "trainer.strategy": fits, "trainer.precision": types}
    return made


def _arguments(settings: Settings) -> Settings:
    """The arguments of a class in a config, in which they stand below ``init_args`` or at once."""
    return settings.setdefault("init_args", {}) if "class_path" in settings else settings


def _from_objects(module: LightningModule, data: LightningDataModule) -> Settings | None:
    """Classes and arguments of objects that keep them; None if one does not."""
    arguments = data_arguments(data)
    if arguments is None or (not module.hparams and len(inspect.signature(type(module)).parameters)):
        return None
    known = inspect.signature(type(module)).parameters
    own = {name: value for name, value in module.hparams.items() if name in known}
    return {"model": class_settings(type(module), own), "data": class_settings(type(data), arguments)}


def data_arguments(data: LightningDataModule) -> Settings | None:
    """The arguments that a data module was made with; None if it does not keep them."""
    if data.hparams:
        return {name: value for name, value in data.hparams.items()}
    if not isinstance(data, SFTDataModule):
        return None
    own = vars(data) | data.sources | vars(data.settings)
    own |= {
        "max_rows": data.limits["train"],
        "validation_rows": data.limits["validation"],
        "max_length": data.max_length,
    }
    names = inspect.signature(SFTDataModule).parameters
    if own["tokenizer"] is not None and not isinstance(own["tokenizer"], str):
        return None
    if data.shares is not None:
        own["train"] = dict(data.sources["train"])  # type: ignore[arg-type]
    return {name: own[name] for name in names if name in own}
