"""The model that was trained, its tokenizer, and its base."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from lightning_lora.cli.generate.source import Source
from lightning_lora.data.tokenizer import find_tokenizer
from lightning_lora.errors import (
    BaseMismatchError,
    ConfigError,
    GenerateError,
    RunSourceError,
    check_choice,
    first_line,
)
from lightning_lora.files.adapter.peft_format import CONFIG_FILE, recorded_base
from lightning_lora.files.adapter.save_load import load_adapter
from lightning_lora.files.json_object import read_json
from lightning_lora.files.lightning_checkpoint import read_checkpoint, written_by
from lightning_lora.lightning_messages import messages_from
from lightning_lora.lora.adapter import disable_lora
from lightning_lora.tasks import CausalLM
from lightning_lora.tasks.by_name import TASKS, task_named
from lightning_lora.tasks.loading import BASE_DTYPES, load_model, read_config
from lightning_lora.tasks.pretrained import PretrainedTask

if TYPE_CHECKING:  # the module imports torchao, bitsandbytes and peft
    from transformers import PreTrainedModel

_SHARED = inspect.signature(PretrainedTask.__init__).parameters.keys()
_OTHER_PEFT_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")


@dataclass(frozen=True)
class Loading:
    """Where and how a model is loaded.

    Args:
        device: A device as torch names it.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        base: The base to load in place of the recorded one.
        allow_other_base: Whether an adapter may be put on weights that it was not trained on.
    """

    device: str
    dtype: str
    base: str | None = None
    allow_other_base: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type as torch knows it."""
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Loaded:
    """A model ready to generate, in eval mode.

    Args:
        model: The trained model.
        tokenizer: Its tokenizer.
        origin: What was loaded, for the user.
        is_adapted: Whether the model is its base with adapters, which can be switched off.
        other_base: The base as a model of its own; None if it is in ``model``, or not loaded.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    origin: str
    is_adapted: bool = False
    other_base: PreTrainedModel | None = None

    @property
    def has_base(self) -> bool:
        """Whether there is a base to ask."""
        return self.is_adapted or self.other_base is not None

    @contextmanager
    def base(self) -> Iterator[PreTrainedModel]:
        """Within the context, the base model: the same weights in memory with the adapters off, where there are any."""
        if self.other_base is not None:
            yield self.other_base
            return
        with disable_lora(self.model):
            yield self.model


def choose_loading(device: str | None, dtype: str | None, base: str | None, allow_other_base: bool) -> Loading:
    """Choose device and type: a GPU in bfloat16 if there is one, else the CPU in float32.

    Raises:
        ConfigError: If the device or the type is unknown, or not on this machine.
    """
    if dtype is not None:
        check_choice("--dtype", dtype, BASE_DTYPES)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.empty(0, device=device).device.type
    except (RuntimeError, AssertionError) as error:
        raise GenerateError(f"--device {device!r} cannot be used on this machine: {first_line(error)}") from error
    if kind == "meta":
        raise GenerateError(f"--device {device!r} holds shapes and no values, so nothing can be computed on it.")
    return Loading(device, dtype or ("float32" if kind == "cpu" else "bfloat16"), base, allow_other_base)


def load(source: Source, how: Loading, tokenizer: str | None = None, compare: bool = False) -> Loaded:
    """Load the model of ``source``, and the base too if it is to be compared with a model that is not adapted.

    Args:
        source: What to load.
        how: Device, type and base.
        tokenizer: A tokenizer to use in place of the model's own.
        compare: Whether the base will be asked.

    Raises:
        AdapterFileError: If the source cannot be read, or is not of a causal language model.
        BaseMismatchError: If the base is not the one that the adapter was trained on.
        ConfigError: If the base or the tokenizer cannot be loaded, or there is no base to compare with.
    """
    load_kind = {"checkpoint": _load_checkpoint, "adapter": _load_adapter_folder, "model": _load_model_folder}
    loaded = load_kind[source.kind](source.path, how, tokenizer, compare)
    for model in filter(None, (loaded.model, loaded.other_base)):
        model.eval().requires_grad_(False)
        _move(model, how.device)
    return loaded


def _load_adapter_folder(path: Path, how: Loading, tokenizer: str | None, compare: bool) -> Loaded:
    peft = read_json(path / CONFIG_FILE)
    if peft.get("task_type") in _OTHER_PEFT_TASKS:
        raise RunSourceError(f"{path} is the adapter of another task ({peft['task_type']}): it writes no text.")
    name = how.base or recorded_base(path)
    if not name:
        raise GenerateError(f"{path} does not say on which base it was trained: name it with --base.")
    model = _load_base(name, how, None if how.base else path)
    try:
        load_adapter(model, path, how.allow_other_base)
    except BaseMismatchError as error:
        raise BaseMismatchError(
            f"{error} On this command line: --base names another base, --allow-other-base takes this one. The run "
            "folder of a run on a quantised base loads that base."
        ) from error
    has_tokenizer = (path / "tokenizer_config.json").is_file()
    return Loaded(
        model, find_tokenizer(tokenizer or (str(path) if has_tokenizer else name), None), f"{path} on {name}", True
    )


def _load_checkpoint(path: Path, how: Loading, tokenizer: str | None, compare: bool) -> Loaded:
    checkpoint = read_checkpoint(path)
    kind, settings = _task_and_settings(checkpoint, path)
    recorded = settings["model"]
    settings |= {"dtype": how.dtype, **({"model": how.base} if how.base else {})}
    try:
        with messages_from(logging.WARNING):
            task = kind(**settings)
    except ConfigError as error:
        hint = "" if how.base else f" The run has named it so: name its present place with --base, for {recorded!r}."
        raise GenerateError(f"{path}: {error}{hint}") from error
    task.lora_allow_other_base = how.allow_other_base
    with messages_from(logging.WARNING):
        task.configure_model()
    task.on_load_checkpoint(checkpoint)
    task.load_state_dict(checkpoint["state_dict"], strict=task.strict_loading)
    assert task.model is not None
    is_adapted, name = task.lora is not None, settings["model"]
    base = _load_base(name, how, None) if compare and not is_adapted else None
    origin = f"{path} on {name}" if is_adapted else f"{path}, {name} trained in full"
    return Loaded(task.model, find_tokenizer(tokenizer or name, None), origin, is_adapted, base)


def _task_and_settings(checkpoint: dict[str, Any], path: Path) -> tuple[type[CausalLM], dict[str, Any]]:
    """The task that has written a checkpoint, and its settings.

    Raises:
        AdapterFileError: If it is none that writes text.
    """
    given = checkpoint.get("hyper_parameters", {})
    settings = {name: value for name, value in given.items() if not name.startswith("_")}  # those are Lightning's
    name = written_by(checkpoint)
    kind = task_named(name)
    # A run without the command line records no class. All settings of a CausalLM are those that every task has.
    if not name and "model" in settings and settings.keys() <= _SHARED:
        kind = CausalLM
    if kind is None or not issubclass(kind, CausalLM):
        names = ", ".join(task.__name__ for task in TASKS if issubclass(task, CausalLM))
        advice = f" Its adapter folder works where there is one: {folder}." if (folder := _adapter_beside(path)) else ""
        writer = name or "a module of yours"
        raise RunSourceError(f"{path} was written by {writer}, and text is generated with {names} only.{advice}")
    return kind, settings


def _adapter_beside(checkpoint: Path) -> Path | None:
    folder = checkpoint.absolute().parent.parent / "adapters" / "last"
    is_there = (folder / CONFIG_FILE).is_file()
    return folder if is_there and read_json(folder / CONFIG_FILE).get("task_type") not in _OTHER_PEFT_TASKS else None


def _load_model_folder(path: Path, how: Loading, tokenizer: str | None, compare: bool) -> Loaded:
    if compare and not how.base:
        raise GenerateError(
            f"{path} is a whole model, and there is nothing to compare it with: leave out --compare, or name another "
            "model with --base."
        )
    model = _load_base(str(path), how, None)
    base = _load_base(how.base, how, None) if compare and how.base else None
    return Loaded(model, find_tokenizer(tokenizer or str(path), None), str(path), other_base=base)


def _load_base(name: str, how: Loading, adapter: Path | None) -> PreTrainedModel:
    """Load a causal language model; ``adapter`` is the folder that has named it, for messages."""
    try:
        config = read_config(name)
        kinds = [kind for kind in getattr(config, "architectures", None) or () if "Classification" in kind]
        if kinds:
            raise GenerateError(f"{name} is a {kinds[0]}: it writes no text.")
        return load_model(AutoModelForCausalLM, name, new_head=False, config=config, dtype=how.torch_dtype)
    except ValueError as error:  # of transformers, if the config is not of a causal language model
        where = f"{adapter} was trained on {name!r}: " if adapter else ""
        hint = " Name its present place with --base." if adapter else ""
        raise GenerateError(f"{where}{first_line(error)}{hint}") from error


def _move(model: PreTrainedModel, device: str) -> None:
    try:
        model.to(device)  # pyright: ignore[reportArgumentType]
    except torch.OutOfMemoryError as error:
        raise GenerateError(f"the model does not fit on {device}: give --device cpu, or --dtype bfloat16.") from error
    except ValueError as error:  # of transformers, for 8-bit weights
        raise GenerateError(f"the model cannot be moved to {device}: {error} Give --device cpu.") from error
