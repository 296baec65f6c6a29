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
    if parts is None or not all(isinstance(each, Mapping) for each in _listed(trainer.get("callbacks"))):
        return None, {}
    seed = parts.get("seed_everything", 0)
    made: Settings = {"seed_everything": seed}
    reasons: dict[str, Reason] = {}
    if seed == 0:
        reasons["seed_everything"] = Reason("seed 0", "the default of fit", "LoRACLI")
    why = {topic: [reason for each, reason in topics if each == topic] for topic in ("method", "settings")}
    model = plain(parts["model"])
    made["model"] = _model(model, module, settings, method, lora, reasons, why)
    made["data"] = _data(plain(parts["data"]), data, settings, reasons, why["settings"])
    made["trainer"] = _trainer({**plain(parts.get("trainer") or {}), **trainer}, settings, method, reasons, why)
    callbacks = _callbacks(made["trainer"].pop("callbacks", None), module, method, lora, planned, reasons, why)
    if callbacks:
        made["trainer"]["callbacks"] = callbacks
    for name, default in (("allow_other_base", False), ("ckpt_path", None), ("weights_only", None)):
        if parts.get(name, default) != default:
            made[name] = parts[name]
    return made, reasons


def _callbacks(
    given: Any,
    module: LightningModule,
    method: Method,
    lora: LoRAConfig,
    planned: Mapping[str, Any] | None,
    reasons: dict[str, Reason],
    why: Mapping[str, Sequence[Reason]],
) -> list[Any]:
    """The user's callbacks, but for adapters and numbers of an earlier plan, and those of this plan."""
    kept = _listed(given)
    old = {_name(each): each for each in kept}
    kept = [each for each in kept if _name(each) not in ("LoRA", "PlannedRun")]
    if not _takes_lora(module) and method.rank is not None:
        chosen = plain(without_defaults(LoRAConfig, vars(lora) | {"rank": method.rank})) | {"rank": method.rank}
        others = old["LoRA"].get("init_args") or {} if isinstance(old.get("LoRA"), Mapping) else {}
        arguments = {name: value for name, value in others.items() if value} | {"config": chosen}
        reasons[f"trainer.callbacks.{len(kept)}"] = why["method"][0]
        kept.append({"class_path": "lightning_lora.callbacks.LoRA", "init_args": arguments})
    if planned is not None:
        what = "fit prints these beside what it measured; steps, tokens and parameters are exact, memory is traced"
        reasons[f"trainer.callbacks.{len(kept)}"] = Reason("planned", what, "this plan")
        kept.append({"class_path": "lightning_lora.callbacks.PlannedRun", "init_args": dict(planned)})
    return kept


def _listed(callbacks: Any) -> list[Any]:
    return callbacks if isinstance(callbacks, list) else [] if callbacks is None else [callbacks]


def _name(callback: Any) -> str:
    """The name of the class of a callback in a config."""
    path = callback.get("class_path", "") if isinstance(callback, Mapping) else callback
    return str(path).rpartition(".")[2]


def _takes_lora(module: LightningModule) -> bool:
    """Whether the module has LoRA settings of its own."""
    return isinstance(module, PretrainedTask) or hasattr(module, "lora")


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
    if _takes_lora(module):
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
    made = without_defaults(Trainer, trainer)
    if "max_epochs" not in made and "max_steps" not in made:
        made["max_epochs"] = 1
        reasons["trainer.max_epochs"] = Reason("1 epoch", "no length was given", "Trainer would take 1,000")
    given = made.pop("strategy", None)
    nodes = int(made.get("num_nodes") or 1)
    made |= {"accumulate_grad_batches": planned["accumulate_grad_batches"], "devices": planned["devices"] // nodes}
    made |= {"precision": planned["precision"], "strategy": strategy_setting(method.strategy)}
    rows = next((reason for reason in why["settings"] if "rows per step" in reason.value), why["settings"][-1])
    reasons["trainer.accumulate_grad_batches"] = rows
    number = f"{planned['devices']} device{'' if planned['devices'] == 1 else 's'}"
    where = Reason(number, "those that were named, or are here", "this plan")
    was = f"; yours was {_name(given)}" if given not in (None, "auto", made["strategy"]) else ""
    fits = Reason(method.strategy, f"the first strategy in whose memory the method fits{was}", "traced")
    types = _types(planned["precision"], trainer.get("precision"), method)
    reasons |= {"trainer.devices": where, "trainer.strategy": fits, "trainer.precision": types}
    _limit_interval(made, planned, reasons)
    return made


def _types(precision: str, given: Any, method: Method) -> Reason:
    """Why a precision was chosen."""
    if given is not None:
        return Reason(precision, "yours", "the config")
    if precision == "32-true":
        return Reason(precision, "the default without a GPU", "Lightning")
    if method.name == "full":
        return Reason(precision, "weights and optimizer in float32, products in bfloat16", "convention")
    return Reason(precision, "frozen weights in bfloat16, adapters in float32", "as QLoRA computes, arXiv 2305.14314")


def _limit_interval(trainer: Settings, planned: Mapping[str, Any], reasons: dict[str, Reason]) -> None:
    """Validate at least once in an epoch: a Trainer refuses more batches than an epoch has."""
    interval, most = trainer.get("val_check_interval"), planned.get("batches_in_epoch")
    is_number = isinstance(interval, int) and not isinstance(interval, bool)
    if is_number and most and interval > most and trainer.get("check_val_every_n_epoch", 1) is not None:
        trainer["val_check_interval"] = most
        why = f"yours was {interval}, and an epoch has {most} batches of so many rows"
        reasons["trainer.val_check_interval"] = Reason(f"{most} batches", why, "this plan")


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
