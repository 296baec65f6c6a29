"""Folders of shards read as one checkpoint, without running what they may hold.

``FSDPStrategy(state_dict_type="sharded")`` and ``ModelParallelStrategy`` (by default) write a folder that each reads
back on any number of ranks; no other strategy does. Read here, it is a checkpoint like any other: one device and DDP
resume from it, and `lightning_lora.checkpoints.consolidate` makes a file of it that goes everywhere.

torch reads the folder's index and small values with ``pickle``; here both are limited to plain types.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _METADATA_FILENAME as META
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from typing_extensions import override

from lightning_lora.errors import AdapterFileError
from lightning_lora.files.lightning_checkpoint import CHECKPOINT_KEY

_PLAIN = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
    (_StorageInfo.__module__, _StorageInfo.__qualname__),
}


def is_folder_of_shards(path: Path) -> bool:
    """Whether Lightning's sharded strategies have written ``path``."""
    return path.is_dir() and (path / META).is_file()


def read_shards(folder: Path) -> dict[str, Any]:
    """The checkpoint in ``folder`` as one device would have written it, all of it in memory.

    Of an adapter's checkpoint only what was trained is kept: the base is the module's own.

    Raises:
        AdapterFileError: If a part is damaged or missing, or holds other than plain types.
    """
    try:
        checkpoint = torch.load(folder / META, map_location="cpu", weights_only=True)
        parts: dict[str, Any] = {}
        _load_state_dict(parts, _PlainReader(folder), planner=_PlainPlanner(), no_dist=True)
    except (Exception, CheckpointException) as error:  # torch's own is no Exception
        raise AdapterFileError(f"{folder} cannot be read as a folder of shards: {error}") from error
    # FSDP1 calls it "model".
    state = parts["state_dict"] if "state_dict" in parts else parts["model"]
    if CHECKPOINT_KEY in checkpoint:
        frozen = checkpoint[CHECKPOINT_KEY].get("frozen", ())
        state = {name: value for name, value in state.items() if name not in frozen}
    optimizers = sorted((name for name in parts if name.startswith("optimizer_")), key=lambda n: int(n.split("_")[1]))
    if optimizers:
        checkpoint["optimizer_states"] = [parts[name] for name in optimizers]
    return checkpoint | {"state_dict": state}


class _PlainUnpickler(pickle.Unpickler):
    @override
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        is_dtype = module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype)
        is_index = module_name == Metadata.__module__ and "." not in global_name
        if is_dtype or (module_name, global_name) in _PLAIN:
            return super().find_class(module_name, global_name)
        found = super().find_class(module_name, global_name) if is_index else None
        # What that module has imported is not its own.
        if getattr(found, "__module__", "") != Metadata.__module__:
            raise pickle.UnpicklingError(f"its index names {module_name}.{global_name}, which is no plain type")
        return found


class _PlainReader(FileSystemReader):
    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _PlainUnpickler(file).load()
        for place in metadata.storage_data.values():
            self._check(place)
        return metadata

    def _check(self, place: _StorageInfo) -> None:
        """Compare the checksums that torch writes and does not read."""
        with open(Path(self.path) / place.relative_path, "rb") as file:
            file.seek(place.offset)
            with zipfile.ZipFile(io.BytesIO(file.read(place.length))) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"checksum of {damaged} in {place.relative_path} at {place.offset}")


class _PlainPlanner(_EmptyStateDictLoadPlanner):
    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # Torch loads it without limits; what has passed these holds nothing else.
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)
