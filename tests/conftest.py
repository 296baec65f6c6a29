from __future__ import annotations

import gc
import os
import types
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

# Libraries are imported where they are used: the process that hands out tests to others needs none.
LONGEST = (
    "test_strategies.py",
    "test_cluster.py",
    "test_on_gpu.py",
    "test_first_hour.py",
    "test_first_use.py",
    "test_faults.py",
    "test_step_trace.py",
    "test_study_command.py",
    "test_configs.py",
    "test_policy_gradient.py",
    "test_matrix.py",
    "test_docs.py",
    "test_docs_site.py",
    "test_notebooks.py",
    "test_resume.py",
    "test_demo.py",
    "test_noise_mutations.py",
    "test_kernels.py",
)
"""Files that take fifteen seconds and more."""
MORE_THAN_THE_LOWEST = {
    "test_a_step_of_grouped_experts_can_be_captured": ("transformers", "5.24", "its grouped products ask the host"),
    "test_a_compiled_block_is_one_graph": ("transformers", "5.24", "its grouped products cannot be compiled"),
    "test_experts_and_router_load_as_the_sum_of_their_updates[deepseek_v3]": (
        "transformers",
        "5.24",
        "its router is read past the wrapper of PEFT",
    ),
    "test_adapters_of_experts_load_here_and_in_peft[qwen3_next": ("transformers", "5.24", "PEFT refuses a convolution"),
    "test_every_weight_layer_has_its_role[vit]": ("transformers", "5.24", "its layers have other names"),
    "test_a_published_config_that_contradicts": ("transformers", "5.24", "it does not write such a config itself"),
    "test_what_a_model_does_to_its_logits_is_never_dropped[minicpm 3": ("transformers", "5.24", "no MiniCPM3"),
    "test_a_gpu_keeps_sdpa_with_a_warning_that_says_why[a kernel that fails]": ("torch", "2.13", "no such refusal"),
    "test_a_new_head_and_norms_that_autocast_widens": (
        "torch",
        "2.13",
        "autocast rounds otherwise outside of a Trainer",
    ),
    "test_a_compiled_module_trains_saves_and_resumes": ("torch", "2.13", "gate and up are compiled as two products"),
}
"""Beginnings of names of tests: a library, a version that they pass with, and what an older one lacks."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: a worker is given one file after the other, and the last should be short."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    for item in items:
        for name, (library, passes, lacks) in MORE_THAN_THE_LOWEST.items():
            if item.name.startswith(name) and Version(version(library)).release < Version(passes).release:
                item.add_marker(pytest.mark.skip(reason=f"{library} {version(library)}: {lacks}"))
    items.sort(key=lambda item: (item.path.name not in LONGEST, item.path not in slow))


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not go through all modules again at every collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten afterwards."""
    from lightning_lora.lora.layers import registry
    from lightning_lora.lora.targets import roles

    monkeypatch.setattr(roles, "_REGISTERED", dict(roles._REGISTERED))
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with its tokenizer on disk."""
    from tests.support import toys

    return toys.save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session", autouse=True)
def cheap_seeds() -> None:
    """Without a device, torch formats the stack for each of three kinds at every seed: a millisecond below pytest."""
    import torch

    if not torch.accelerator.is_available():
        for kind in (torch.cuda, torch.xpu, torch.mtia):
            kind.traceback = types.SimpleNamespace(format_stack=list)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> None:
    """No test cuts the power, so nothing need reach the disk; `test_system_calls` sees that a process asks for it."""
    os.fsync = lambda fd: None


@pytest.fixture(autouse=True)
def seed() -> None:
    """Each test begins with the same random numbers, and computes in one thread."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """A strategy of several processes that a test makes tells later ones, and their children, that they are one of
    them, and where its processes meet."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
