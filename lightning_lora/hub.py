"""A hub that cannot be reached: told in seconds, and what is on this machine already is used."""

from __future__ import annotations

import functools
import os
import socket
import sys
import threading
import urllib.request
from urllib.parse import urlsplit

from huggingface_hub import constants
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

TIMEOUT = 4.0
"""Seconds for finding and greeting the host; the hub's own client tries for half a minute, for every file."""


def prepare_hub(name: str) -> None:
    """Before ``name`` is looked up: go offline for the rest of the process if the hub cannot be reached.

    Args:
        name: A hub name; for a folder of this machine nothing is done.
    """
    # Whoever has set the variable, to 0 too, has decided.
    if not name or os.path.isdir(name) or constants.is_offline_mode() or os.environ.get("HF_HUB_OFFLINE"):
        return
    if not _is_reachable(constants.ENDPOINT):
        # For processes that this one starts; the others read it only once, when they are imported.
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        rank_zero_warn(
            f"{constants.ENDPOINT} cannot be reached: from here on only what is on this machine is used. Set "
            f"HF_HUB_OFFLINE=1 to say so beforehand, or 0 to ask the hub all the same."
        )


def offline_hint(name: str) -> str:
    """What to add to an error about ``name``; nothing where the hub was asked, or it is a folder."""
    if os.path.isdir(name) or not constants.is_offline_mode():
        return ""
    return (
        f" It is not on this machine, and the hub is not asked (HF_HUB_OFFLINE=1, or {constants.ENDPOINT} cannot be "
        f"reached): run `hf download` where there is a network and set HF_HOME to its cache, or HF_HUB_OFFLINE=0."
    )


@functools.cache
def _is_reachable(endpoint: str) -> bool:
    address = urlsplit(endpoint)
    if {address.scheme, "all"} & urllib.request.getproxies().keys():
        return True  # The proxy looks names up, and knows.
    found: list[bool] = []
    thread = threading.Thread(target=_greet, args=(address.hostname, address.port or 443, found), daemon=True)
    thread.start()
    # A resolver that does not answer keeps no timeout of ours.
    thread.join(TIMEOUT)
    return bool(found)


def _greet(host: str, port: int, found: list[bool]) -> None:
    try:
        socket.create_connection((host, port), TIMEOUT).close()
    except OSError:
        return
    found.append(True)
