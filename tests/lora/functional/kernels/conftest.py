"""Triton decides while it is imported whether it interprets: only a process of its own may be told to."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["under_interpreter"]
