"""Kernels without a GPU: computed by Triton's interpreter, and compiled for GPUs that are not there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.support import warm

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (pip install lightning-lora[gpu])"
)


@pytest.mark.slow
@needs_triton
def test_kernels_pass_their_tests_under_the_interpreter() -> None:
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist")
    done = warm.run_cold("-m", "pytest", *options, HERE / "under_interpreter", TRITON_INTERPRET="1")
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.slow
@needs_triton
def test_kernels_compile_and_fit_into_shared_memory(tmp_path: Path) -> None:
    warm.run_cold(HERE / "compiling.py", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
