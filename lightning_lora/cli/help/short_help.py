"""The first page of ``fit --help``: the settings that people need, each with its reason; ``--help all`` shows the rest.

Nothing is imported for it, so it is there at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import dedent

_DATA = {
    "--model.init_args.model NAME": "folder or hub name of the model to start from",
    "--data.init_args.train FILE": "rows to learn from: .jsonl, .json, .csv, .parquet, or a hub data set",
    "--data.init_args.validation FILE": "rows to judge by, or a share of the others: 0.05",
}
_RUN = {
    "--trainer.max_epochs N": "passes through the rows; or --trainer.max_steps N",
    "--trainer.devices N": "GPUs of this machine; several: add cli_configs/strategy/ddp.yaml",
    "--trainer.precision NAME": "32-true, bf16-true or bf16-mixed; cli_configs/gpu.yaml is right for most",
    "--trainer.default_root_dir DIR": "where runs are written (default: runs)",
}
_TRAINING = {
    "--model.init_args.learning_rate X": "that of full fine-tuning; adapters train at 10 times it",
    "--model.init_args.lora.rank N": "size of the adapters: `lightning-lora plan` proposes one",
    "--data.init_args.batch_size N": "rows of a device at once, as memory allows",
    "--target_batch_size N": "rows of a step; the accumulation follows. Small ones suit LoRA",
    "--ckpt_path FILE": "go on from a checkpoint, exactly as if the run had not stopped",
}
_EVALUATION = {"--ckpt_path FILE": "the checkpoint to evaluate"}
_PROBE = {
    "--rank": "try twice the rank instead of other batch sizes",
    "--batch_probe.at N": "optimizer steps before other batch sizes are tried",
    "--rank_probe.at N": "optimizer steps before twice the rank is tried",
}

OPTIONS: dict[str, dict[str, str]] = {
    "fit": _DATA | _TRAINING | _RUN,
    "validate": _DATA | _EVALUATION | _RUN,
    "test": _DATA | _EVALUATION | _RUN,
    "predict": _DATA | _EVALUATION | _RUN,
    "probe": _DATA | _TRAINING | _PROBE | _RUN,
    "preview": _DATA | {"--data.init_args.max_length N": "tokens of a row; longer ones are cut or left out"},
}
"""The options to know first, of each command that has hundreds, and what they are for."""
PURPOSE = {
    "fit": "Train. Each config file goes over those before it, and options go over all.",
    "validate": "Compute the loss on the validation rows.",
    "test": "Compute the loss on the test rows.",
    "predict": "Run the model over rows.",
    "probe": "Train for a while, then try other batch sizes, or twice the rank.",
    "preview": "Show three rows as the model sees them, and what is trained in them.",
}
EXAMPLES = {
    "preview": "lightning-lora preview rows.jsonl --model models/base",
    **{
        name: f"lightning-lora {name} -c cli_configs/sft.yaml -c cli_configs/lora.yaml"
        for name in OPTIONS
        if name != "preview"
    },
}
"""A command line of each, as its help shows it."""


def asks_for_short_help(arguments: Sequence[str]) -> bool:
    """Whether ``--help`` is asked for, and not ``--help all``."""
    place = _place_of_help(arguments)
    return place is not None and list(arguments[place + 1 : place + 2]) != ["all"]


def without_all(arguments: Sequence[str]) -> list[str]:
    """``--help all`` as the parser knows it: ``--help``."""
    place = _place_of_help(arguments)
    return list(arguments) if place is None else [*arguments[: place + 1], *arguments[place + 2 :]]


def _place_of_help(arguments: Sequence[str]) -> int | None:
    return next((place for place, word in enumerate(arguments) if word in ("-h", "--help")), None)


def short_help(command: str) -> str:
    """The page of a command of `OPTIONS`."""
    options = {"--config FILE": "a recipe (repeatable); lightning-lora recipes lists them", **OPTIONS[command]}
    rows = [f"  {name}\n      {text}" for name, text in options.items()]
    head = f"usage: lightning-lora {command} --config FILE ... [--OPTION VALUE ...]"
    foot = dedent(f"""\
        The config with all its values:
          lightning-lora {command} --config FILE --print_config
        Every option, and the settings of a class:
          lightning-lora {command} --help all
          lightning-lora {command} --model.help lightning_lora.tasks.DPO

        example:
          {EXAMPLES[command]}
        """)
    return "\n".join([head, "", PURPOSE[command], "", *rows, "", foot])
