"""The rows of PEFT's own test tables, read from a checkout of its repository.

A test file is not imported, as its helpers need packages and a network. Its top-level statements are executed one by
one without the test classes; a name that the installed PEFT does not have becomes an `Absent`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tests.harness.peft_models import build


class Absent:
    """Stands for a configuration class that the installed PEFT does not have."""

    def __init__(self, *_: Any, **__: Any) -> None: ...


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Args:
        name: Table, model and settings, for reports.
        build: Builds the model of the row, the same one in every call.
        config: The configuration class.
        settings: Its arguments.
    """

    name: str
    build: Callable[[], nn.Module]
    config: type
    settings: dict[str, Any]


# File, the list of its models, if it has one.
_MODEL_TABLES = {
    "test_decoder_models.py": "PEFT_DECODER_MODELS_TO_TEST",
    "test_encoder_decoder_models.py": "PEFT_ENCODER_DECODER_MODELS_TO_TEST",
    "test_feature_extraction_models.py": "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST",
    "test_seq_classifier.py": "PEFT_SEQ_CLS_MODELS_TO_TEST",
}


def rows(checkout: Path) -> Iterator[Row]:
    """Every row of the tables, those of other methods included.

    Raises:
        FileNotFoundError: If ``checkout`` is not a checkout of PEFT.
    """
    tests = checkout / "tests"
    custom = _executed(tests / "test_custom_models.py")
    yield from _custom_rows(custom)
    yield from _pairs_of_adapters(custom)
    for file, models in _MODEL_TABLES.items():
        content = _executed(tests / file)
        for model in content[models]:
            for number, (config, settings) in enumerate(map(_values, content["ALL_CONFIGS"])):
                name = f"{file} {model.rpartition('/')[2]} {number}"
                yield Row(name, lambda model=model: build(model), config, settings)
    for number, row in enumerate(_executed(tests / "test_target_parameters.py")["ALL_CONFIGS"]):
        model, config, settings = _values(row)
        name = f"test_target_parameters.py {model.rpartition('/')[2]} {number}"
        yield Row(name, lambda model=model: build(model), config, settings)


def _custom_rows(content: dict[str, Any]) -> Iterator[Row]:
    models = content["MockTransformerWrapper"]
    for row in content["TEST_CASES"]:
        name, model, config, settings = _values(row)
        yield Row(f"TEST_CASES {name}", lambda model=model: models.from_pretrained(model), config, settings)


def _pairs_of_adapters(content: dict[str, Any]) -> Iterator[Row]:
    """Both adapters of every pair that PEFT activates together, as each of them is saved by itself."""
    models = content["MockTransformerWrapper"]
    for row in content["MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES"]:
        name, method, config, *both = _values(row)
        model = "EmbConv1D" if method == "lora+trainable_tokens" else "MLP"
        for number, settings in enumerate(both):
            title = f"MULTIPLE_ACTIVE_ADAPTERS {name} {number}"
            yield Row(title, lambda model=model: models.from_pretrained(model), config, settings)


def _values(row: Any) -> tuple[Any, ...]:
    """The values of a row, which may be a ``pytest.param``."""
    return tuple(getattr(row, "values", row))


def _executed(file: Path) -> dict[str, Any]:
    """The names that the top-level statements of a test file define."""
    content: dict[str, Any] = {"__name__": file.stem}
    for statement in ast.parse(file.read_text()).body:
        if isinstance(statement, ast.ImportFrom):
            _import(statement, content)
        elif not (isinstance(statement, ast.ClassDef) and statement.name.startswith("Test")):
            try:
                exec(compile(ast.Module([statement], []), str(file), "exec"), content)
            except (ImportError, NameError, AttributeError):
                # Helpers of tests that need other packages. A table that were missing would be a KeyError later.
                continue
    return content


def _import(statement: ast.ImportFrom, content: dict[str, Any]) -> None:
    """Import each name by itself; relative ones and those of packages that are absent are left out."""
    if statement.level:
        return
    for alias in statement.names:
        single = ast.ImportFrom(statement.module, [alias], 0)
        try:
            exec(compile(ast.fix_missing_locations(ast.Module([single], [])), "<import>", "exec"), content)
        except ImportError:
            content[alias.asname or alias.name] = type(alias.name, (Absent,), {})
