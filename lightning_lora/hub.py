"""Access to the Hugging Face hub: notice within seconds that it cannot be reached, then use local files only."""

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
"""Seconds to find the hub and connect to it. The hub's own client tries for half a minute, for every file."""


def prepare_hub(name: str) -> None:
    """Go offline for the rest of the process if the hub cannot be reached. Call this before looking ``name`` up.

    Args:
        name: A hub name. For a folder on this machine nothing is done.
    """
    # A user who has set the variable, even to 0, has decided already.
    if not name or os.path.isdir(name) or constants.is_offline_mode() or os.environ.get("HF_HUB_OFFLINE"):
        return
    if not _is_reachable(constants.ENDPOINT):
        # The variable is for processes that this one starts. Libraries here read it only when they are imported.
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        rank_zero_warn(
            f"{constants.ENDPOINT} cannot be reached: from now on only files on this machine are used. Set "
            f"HF_HUB_OFFLINE=1 to skip this check, or HF_HUB_OFFLINE=0 to try the hub anyway."
        )


def offline_hint(name: str) -> str:
    """The end of an error message about the missing ``name``; empty if ``name`` is a folder or the hub was asked."""
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
        return True  # Only the proxy can tell.
    connected: list[bool] = []
    thread = threading.Thread(target=_connect, args=(address.hostname, address.port or 443, connected), daemon=True)
    thread.start()
    # A name server that does not answer ignores the timeout of the socket.
    thread.join(TIMEOUT)
    return bool(connected)


def _connect(host: str, port: int, connected: list[bool]) -> None:
    try:
        socket.create_connection((host, port), TIMEOUT).close()
    except OSError:
        return
    connected.append(True)
