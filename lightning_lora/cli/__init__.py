"""The commands of ``lightning-lora``, and `LoRACLI` for a command line of your own.

Read in this order: `main` (which command) with `missing_package` (its advice), `commands` (those beside ``fit``) with
`help`, `lora_cli` (``fit`` and the others of LightningCLI) with `parser`, `mistakes` (what is wrong with a command
line), `run_config`, `preview` with `escapes`, `probe`, `plan`, `study` and `ending` (what a run leaves behind), `demo`,
`demo_arm` and `demo_remarks` on the `embedded` model and data, `run_source` (what a run folder holds) for `export` with
`end_tokens`, `generate` (what a model answers), `inspection` and `inspection_table`, `quiet` (the libraries below us).
"""

from typing import TYPE_CHECKING

from lightning_lora.cli.quiet import quiet_libraries

if TYPE_CHECKING:
    from lightning_lora.cli.lora_cli import LoRACLI

__all__ = ["LoRACLI"]


def __getattr__(name: str) -> object:
    # Imported when first asked for: `lightning-lora --help` and `merge` start without Lightning.
    if name != "LoRACLI":
        raise AttributeError(f"module 'lightning_lora.cli' has no attribute {name!r}")
    quiet_libraries()
    from lightning_lora.cli.lora_cli import LoRACLI

    return LoRACLI
