from __future__ import annotations

from importlib.metadata import version

from lightning_lora.versions import installed_version


def test_a_package_that_is_not_installed_has_no_version_and_raises_nothing() -> None:
    """A run from a checkout must not fail at its first checkpoint."""
    assert installed_version("torch") == version("torch")
    assert installed_version("lightning-lora-of-nobody") == "not installed"
