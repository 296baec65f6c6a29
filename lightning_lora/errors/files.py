"""Files and folders of adapters and checkpoints."""

from __future__ import annotations

from lightning_lora.errors.base import LoRAError


class AdapterFileError(LoRAError, ValueError):
    """An adapter or checkpoint file is missing, damaged, incomplete or of an unsupported kind.

    Restore the file from a copy, or give another one.
    """

    code = "LL300"
    page = "reference/files.md"


class DamagedFileError(AdapterFileError):
    """A file is damaged, cut off, or not what its name says.

    Copy or download it again; the message says what was expected and what was found.
    """

    code = "LL301"
    page = "reference/files.md"


class AdapterFolderError(AdapterFileError):
    """An adapter folder cannot be read, does not fit the module or the model, or uses what is not supported.

    Give the folder that `save_adapter` or PEFT has written, and the model that it belongs to.
    """

    code = "LL302"
    page = "reference/files.md#adapter-folder"


class CheckpointFileError(AdapterFileError):
    """A checkpoint cannot be read safely, is damaged, or does not fit the module.

    Go on from another checkpoint of the run, or build the module as it was when the checkpoint was written.
    """

    code = "LL303"
    page = "reference/files.md#lightning-checkpoints"


class OutputPlaceError(AdapterFileError):
    """There is something else where a file or folder is to be written.

    Choose another place, or empty it yourself.
    """

    code = "LL304"
    page = "reference/files.md"


class RunSourceError(AdapterFileError):
    """What a command was given is no run, checkpoint, adapter or model that it can use.

    Give the folder of a run, such as `runs/sft/version_0`.
    """

    code = "LL305"
    page = "use/generate.md"


class BaseMismatchError(LoRAError, ValueError):
    """An adapter was trained on base weights that differ from the present ones.

    Load the base that it was trained on; `allow_other_base` loads it all the same.
    """

    code = "LL310"
    page = "reference/files.md#the-base-fingerprint"
