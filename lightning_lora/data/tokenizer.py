"""The tokenizer to use, and its padding token."""

from __future__ import annotations

import os

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from lightning_lora.data.sources import is_path_like
from lightning_lora.errors import TokenizerError
from lightning_lora.hub import offline_hint, prepare_hub


def find_tokenizer(given: str | PreTrainedTokenizerBase | None, module: object | None) -> PreTrainedTokenizerBase:
    """Find the tokenizer to use, and load it if it is given by name.

    Args:
        given: A folder, a hub name or a tokenizer. None takes ``module.tokenizer``.
        module: The LightningModule of the run; None outside a Trainer.

    Raises:
        ConfigError: If there is no tokenizer, or it cannot be loaded.
    """
    if given is None:
        given = getattr(module, "tokenizer", None)
    if isinstance(given, (str, os.PathLike)):
        return _load(os.path.expanduser(os.fspath(given)))
    if given is None:
        whose = "there is no model yet" if module is None else f"{type(module).__name__} has no attribute 'tokenizer'"
        raise TokenizerError(
            f"no tokenizer: none was given and {whose}. Pass tokenizer= a folder, a hub name or an object."
        )
    if not isinstance(given, PreTrainedTokenizerBase):
        raise TokenizerError(f"tokenizer must be a folder, a hub name or a tokenizer, got {type(given).__name__}.")
    return given


def find_context(tokenizer: PreTrainedTokenizerBase, module: object | None) -> tuple[int | None, str]:
    """The most tokens of a row that the model was made for, and what says so; None if it is not known or not limited.

    Args:
        tokenizer: The tokenizer, which may know the length if the module does not say.
        module: The LightningModule of the run; None outside a Trainer.
    """
    if hasattr(module, "context_length"):
        return module.context_length, "the model"  # type: ignore[union-attr]
    known = tokenizer.model_max_length
    return (int(known), "the tokenizer (model_max_length)") if known < VERY_LARGE_INTEGER else (None, "")


def pad_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> int:
    """The token id that fills short rows: that of the pad token, or else of the end token.

    Raises:
        ConfigError: If the tokenizer has neither token, or the model has no embedding for it.
    """
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if not isinstance(found, int):
        raise TokenizerError("the tokenizer has neither a pad_token nor an eos_token to fill short rows with; set one.")
    if vocab_size is not None and found >= vocab_size:
        raise TokenizerError(
            f"the padding id {found} is not below the model's vocab_size={vocab_size}; set another pad_token."
        )
    return found


def _load(name: str) -> PreTrainedTokenizerBase:
    if is_path_like(name) and not os.path.isdir(name):
        raise TokenizerError(f"tokenizer folder {name!r} does not exist (looked from {os.getcwd()}).")
    prepare_hub(name)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # missing files, network, a tokenizer that needs its author's code
        raise TokenizerError(f"tokenizer {name!r} cannot be loaded: {error}{offline_hint(name)}") from error
