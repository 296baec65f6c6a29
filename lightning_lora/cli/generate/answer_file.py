"""Answers as JSON lines."""

from __future__ import annotations

import json
from typing import Any

from lightning_lora.cli.generate.answers import Answer
from lightning_lora.data.prompts.read_prompts import Prompt
from lightning_lora.data.records import Text


def answer_line(prompt: Prompt, tuned: Answer, base: Answer | None = None) -> bytes:
    """One line of JSON: ``messages`` or ``prompt``, then ``answer``, ``stop`` and ``tokens``.

    ``base_answer``, ``base_stop``, ``base_tokens`` and ``reference`` follow where there are such.
    """
    record = prompt.record
    line: dict[str, Any]
    line = {"prompt": record.text} if isinstance(record, Text) else {"messages": record.messages, **record.variables}
    line |= {"answer": tuned.text, "stop": tuned.stop, "tokens": tuned.tokens}
    if base is not None:
        line |= {"base_answer": base.text, "base_stop": base.stop, "base_tokens": base.tokens}
    if prompt.reference is not None:
        line["reference"] = prompt.reference
    return (json.dumps(line, ensure_ascii=False, default=str) + "\n").encode("utf-8", "backslashreplace")
