"""The settings of ``fit`` for a plan, from those that the user gave or from the objects themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging

from lightning_lora.callbacks import LoRA, PlannedRun, TargetBatchSize
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.mixin.lora_mixin import LoRAMixin
from lightning_lora.planning.advice.config_file import plain, taken_arguments, without_defaults
from lightning_lora.planning.advice.method import Method, strategy_setting
from lightning_lora.planning.advice.named_callbacks import as_list, is_named
from lightning_lora.planning.advice.objects import objects_as_config
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
) -> tuple[Settings | None, dict[str, Reason], str | None]:
    """The settings of ``fit``, the reasons by dotted name, and why there are no settings.

    Args:
        config: ``model``, ``data`` and ``trainer`` as a config names them; None if they came as objects.
        planned: Arguments of the callback that prints the plan beside what was measured; None for no callback.

    Returns:
        The settings, or None if the arguments of an object are not known, or no config can set what was planned.
    """
    if why_none := _set_in_class(module, method, lora):
        return None, {}, why_none
    parts = config or objects_as_config(module, data)
    if parts is None or not all(isinstance(each, Mapping) for each in as_list(trainer.get("callbacks"))):
        return None, {}, None
    seed = parts.get("seed_everything", 0)
    made: Settings = {"seed_everything": seed}
    reasons: dict[str, Reason] = {}
    if seed == 0:
        reasons["seed_everything"] = Reason("seed 0", "the default of fit", "LoRACLI")
    why = {topic: [reason for each, reason in topics if each == topic] for topic in ("method", "settings")}
    planner = _Parts(module, settings, method, lora, reasons, why)
    made["model"] = planner.model(plain(parts["model"]))
    made["data"] = planner.data(plain(parts["data"]), data)
    made["trainer"] = planner.trainer({**plain(parts.get("trainer") or {}), **trainer})
    if callbacks := planner.callbacks(made["trainer"].pop("callbacks", None), planned):
        made["trainer"]["callbacks"] = callbacks
    for name, default in (("allow_other_base", False), ("ckpt_path", None), ("weights_only", None)):
        if parts.get(name, default) != default:
            made[name] = parts[name]
    return made, reasons, None


@dataclass(frozen=True)
class _Parts:
    """Puts what is planned into the parts of a config, and the reasons into ``reasons``, by dotted name."""

    module: LightningModule
    planned: Mapping[str, Any]
    method: Method
    lora: LoRAConfig
    reasons: dict[str, Reason]
    why: Mapping[str, Sequence[Reason]]

    def model(self, model: Settings) -> Settings:
        """The module with what is planned."""
        init, taken = _arguments(model), taken_arguments(type(self.module))
        if self.planned["learning_rate"] is not None and "learning_rate" in taken:
            init["learning_rate"] = self.planned["learning_rate"]
            self.reasons["model.init_args.learning_rate"] = self.why["settings"][0]
        if isinstance(self.module, LoRAMixin) and "lora" in taken:
            own = changed_settings(self.lora)
            init["lora"] = (
                None if self.method.rank is None else own | {"rank": self.method.rank, "alpha": self.lora.alpha}
            )
            self.reasons["model.init_args.lora"] = self.why["method"][-1]
        if self.planned["step_memory"] is not None and "step_memory" in taken:
            init["step_memory"] = self.planned["step_memory"]
            init.pop("activation_checkpointing", None)  # it is one of these
            self.reasons["model.init_args.step_memory"] = self.why["settings"][-1]
        if isinstance(self.module, PretrainedTask) and (self.method.name == "qlora" or init.get("quantization")):
            init["quantization"] = "nf4" if self.method.name == "qlora" else None
            self.reasons["model.init_args.quantization"] = self.why["method"][0]
        return model

    def data(self, settings: Settings, data: LightningDataModule) -> Settings:
        """The data module with the rows of a batch."""
        if can_set_batch(data):
            _arguments(settings)["batch_size"] = self.planned["batch_size"]
            told = f"{self.planned['batch_size']} row{'' if self.planned['batch_size'] == 1 else 's'} of a micro-batch"
            reason = Reason(told, "the most that fit and divide the rows of a step", "traced")
            self.reasons["data.init_args.batch_size" if "class_path" in settings else "data.batch_size"] = reason
        return settings

    def trainer(self, trainer: Settings) -> Settings:
        """The Trainer with batch, devices and types."""
        made = without_defaults(Trainer, trainer)
        if "max_epochs" not in made and "max_steps" not in made:
            made["max_epochs"] = 1
            self.reasons["trainer.max_epochs"] = Reason("1 epoch", "no length was given", "Trainer would take 1,000")
        given = made.pop("strategy", None)
        nodes = int(made.get("num_nodes") or 1)
        planned = self.planned
        made |= {"accumulate_grad_batches": planned["accumulate_grad_batches"], "devices": planned["devices"] // nodes}
        made |= {"precision": planned["precision"], "strategy": strategy_setting(self.method.strategy)}
        rows = next((reason for reason in self.why["settings"] if "per step" in reason.value), self.why["settings"][-1])
        self.reasons["trainer.accumulate_grad_batches"] = rows
        number = f"{planned['devices']} device{'' if planned['devices'] == 1 else 's'}"
        where = Reason(number, "those that were named, or are here", "this plan")
        was = f"; yours was {_named(given)}" if given not in (None, "auto", made["strategy"]) else ""
        fits = Reason(self.method.strategy, f"the first strategy in whose memory the method fits{was}", "traced")
        types = _types(planned["precision"], trainer.get("precision"), self.method)
        self.reasons.update({"trainer.devices": where, "trainer.strategy": fits, "trainer.precision": types})
        _limit_interval(made, planned, self.reasons)
        return made

    def callbacks(self, given: Any, planned: Mapping[str, Any] | None) -> list[Any]:
        """The user's callbacks, but for adapters and numbers of an earlier plan, and those of this plan."""
        own = [each for each in as_list(given) if is_named(each, LoRA)]
        # Accumulation is what a TargetBatchSize would set.
        replaced = LoRA, PlannedRun, TargetBatchSize
        kept = [each for each in as_list(given) if not any(is_named(each, kind) for kind in replaced)]
        if not isinstance(self.module, LoRAMixin) and self.method.rank is not None:
            chosen = changed_settings(self.lora) | {"rank": self.method.rank}
            first: Settings = own[0] if own else {"class_path": "lightning_lora.callbacks.LoRA"}
            others = {name: value for name, value in (first.get("init_args") or {}).items() if value}
            if self.planned["step_memory"] is not None:
                others["step_memory"] = self.planned["step_memory"]
            # One that averages weights must come after it.
            place = next((n for n, each in enumerate(kept) if is_named(each, WeightAveraging)), len(kept))
            self.reasons[f"trainer.callbacks.{place}"] = self.why["method"][0]
            kept.insert(place, {"class_path": first["class_path"], "init_args": others | {"config": chosen}})
        if planned is not None:
            what = "fit prints these beside what it measured; steps, tokens and parameters are exact, memory is traced"
            self.reasons[f"trainer.callbacks.{len(kept)}"] = Reason("planned", what, "this plan")
            kept.append({"class_path": "lightning_lora.callbacks.PlannedRun", "init_args": dict(planned)})
        return kept


def _set_in_class(module: LightningModule, method: Method, lora: LoRAConfig) -> str | None:
    """Why no config can give the module the LoRA settings of a plan; None if one can, or it has them."""
    if not isinstance(module, LoRAMixin) or "lora" in taken_arguments(type(module)):
        return None
    own = None if module.lora is None else LoRAConfig.from_dict(module.lora)
    wanted = None if method.rank is None else replace(lora, rank=method.rank)
    if own == wanted:
        return None
    written = "None"
    if wanted is not None:
        changed = {"rank": wanted.rank} | changed_settings(wanted)
        written = f"LoRAConfig({', '.join(f'{name}={value!r}' for name, value in changed.items())})"
    return (
        f"{type(module).__name__} sets its LoRA settings itself, and its constructor takes none: for this plan write "
        f"lora = {written} there, and plan again for a config"
    )


def changed_settings(lora: LoRAConfig) -> Settings:
    """The settings that differ from the defaults."""
    default = vars(LoRAConfig())
    return plain({name: value for name, value in vars(lora).items() if value != default[name]})


def can_set_batch(data: LightningDataModule) -> bool:
    """Whether the rows of a batch are a setting of the data module, which a config can give it."""
    return isinstance(getattr(data, "batch_size", None), int) and "batch_size" in taken_arguments(type(data))


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


def _named(setting: Any) -> str:
    """The name of a class in a config, or of what a config names by a word."""
    path = setting.get("class_path", "") if isinstance(setting, Mapping) else setting
    return str(path).rpartition(".")[2]
