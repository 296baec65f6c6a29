"""Each class of laws runs on its cases: laws of shapes on all of them, the others on one of each kind."""

from __future__ import annotations

import pytest

from tests.lora.layers.laws import ShapeLaws


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.cls is None or "case" not in metafunc.fixturenames:
        return
    names = metafunc.cls.cases if metafunc.function.__name__ in vars(ShapeLaws) else metafunc.cls.kinds
    metafunc.parametrize("case", [metafunc.cls.cases[name] for name in names], ids=names)
