"""Folders of shards, read as one checkpoint without running code that they may hold.

``FSDPStrategy(state_dict_type="sharded")`` and ``ModelParallelStrategy`` (by default) write a folder that each of them
reads on any number of ranks; no other strategy reads it. This file reads it as an ordinary checkpoint: one device and
DDP resume from it, and `consolidate` writes it as one file for all strategies.

torch reads the index of the folder, and small values in it, with ``pickle``; here both are limited to plain types.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _METADATA_FILENAME as META
from lightning.pytorch.strategies import Strategy
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from typing_extensions import override

from lightning_lora.errors import CheckpointFileError
from lightning_lora.files.checkpoint_manifest import packed_parts
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


def writes_shards(strategy: Strategy) -> bool:
    """Whether ``strategy`` writes a checkpoint as a folder of shards."""
    # Lightning has two private settings for it, one in each strategy.
    return getattr(strategy, "_save_distributed_checkpoint", getattr(strategy, "_state_dict_type", "full") == "sharded")


def is_folder_of_shards(path: Path) -> bool:
    """Whether ``path`` is a checkpoint that one of Lightning's sharded strategies has written."""
    return path.is_dir() and (path / META).is_file()


def read_shards(folder: Path) -> dict[str, Any]:
    """Read ``folder`` into memory as the checkpoint that one device would have written.

    From a checkpoint with adapters only trained parameters are kept; frozen weights come from the module.

    Raises:
        AdapterFileError: If a part is damaged or missing, or holds anything but plain types.
    """
    try:
        if packed := packed_parts(folder / META):
            raise zipfile.BadZipFile(f"{packed}, in {META}")
        checkpoint = torch.load(folder / META, map_location="cpu", weights_only=True)
        parts: dict[str, Any] = {}
        _load_state_dict(parts, _PlainReader(folder), planner=_PlainPlanner(), no_dist=True)
    except (Exception, CheckpointException) as error:  # CheckpointException is a BaseException
        raise CheckpointFileError(f"{folder} cannot be read as a folder of shards: {error}") from error
    # FSDP1 names the state dict "model".
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
        # The module also holds names that it has imported from elsewhere.
        if getattr(found, "__module__", "") != Metadata.__module__:
            raise pickle.UnpicklingError(f"its index names {module_name}.{global_name}, which is not a plain type")
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
        """Compare checksums, which torch writes but does not read."""
        with open(Path(self.path) / place.relative_path, "rb") as file:
            file.seek(place.offset)
            part = io.BytesIO(file.read(place.length))
            if packed := packed_parts(part):
                raise zipfile.BadZipFile(f"{packed}, in {place.relative_path} at {place.offset}")
            with zipfile.ZipFile(part) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"checksum of {damaged} in {place.relative_path} at {place.offset}")


class _PlainPlanner(_EmptyStateDictLoadPlanner):
    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # torch loads the value again without limits; this load raises if it holds anything but plain types.
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)
