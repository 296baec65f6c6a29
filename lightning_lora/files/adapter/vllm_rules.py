"""A check that vLLM accepts an adapter. It does not need vLLM: the rules were read in vLLM 0.33.0 on 2026-11-23."""

from __future__ import annotations

from lightning_lora.errors import AdapterFolderError, first_five
from lightning_lora.files.adapter.folder import AdapterFolder

_MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_FULL_MODULES = ("score", "classifier")


def vllm_flags(folder: AdapterFolder) -> str:
    """The ``vllm serve`` options this adapter needs.

    Raises:
        AdapterFileError: If vLLM would refuse the adapter.
    """
    if folder.config.dora:
        raise AdapterFolderError("vLLM loads no adapters with magnitudes (DoRA). Export it merged instead.")
    rank = max(folder.ranks.values())
    if rank > _MAX_RANKS[-1]:
        raise AdapterFolderError(f"vLLM serves adapters up to rank {_MAX_RANKS[-1]}, this one has rank {rank}.")
    modules = {name.rpartition(".")[0].rpartition(".")[2] for name in folder.trained}
    refused = sorted(modules - set(_FULL_MODULES))
    if refused or len(modules) > 1:
        raise AdapterFolderError(
            f"vLLM loads at most one module trained in full, {' or '.join(_FULL_MODULES)}; this adapter has "
            f"{first_five(sorted(modules))}. Export it merged instead."
        )
    return f"--enable-lora --max-lora-rank {next(limit for limit in _MAX_RANKS if limit >= rank)}"
