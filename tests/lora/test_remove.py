"""Laws of removing and disabling adapters."""

from __future__ import annotations

import pytest
import torch

from lightning_lora import disable_lora, inject_lora, remove_lora
from tests.lora.models import BUILDS, adapted, every_build, output
from tests.support.tiny_models import portrait, wake


@every_build
def test_removing_restores_classes_names_and_function(name: str) -> None:
    build, inputs, config = BUILDS[name]
    module = build().eval()
    before, function = portrait(module), output(module, inputs)
    inject_lora(module, config)
    wake(module)
    remove_lora(module)
    after = portrait(module)
    assert {key: after[key] for key in after if key != "trains"} == {
        key: before[key] for key in after if key != "trains"
    }
    assert not any(after["trains"].values())
    assert torch.equal(output(module, inputs), function)


def test_disabling_nests_and_survives_exceptions() -> None:
    module, inputs = adapted("mixed")
    awake = output(module, inputs)
    asleep = output(adapted("mixed", awake=False)[0], inputs)
    with disable_lora(module):
        assert torch.equal(output(module, inputs), asleep)
        with disable_lora(module):
            assert torch.equal(output(module, inputs), asleep)
        assert torch.equal(output(module, inputs), asleep)
        with pytest.raises(KeyError), disable_lora(module.get_submodule("plain")):
            raise KeyError("inside")
        assert torch.equal(output(module, inputs), asleep)
    assert torch.equal(output(module, inputs), awake)
    with pytest.raises(KeyError), disable_lora(module):
        raise KeyError("inside")
    assert torch.equal(output(module, inputs), awake)
    with disable_lora(module.get_submodule("plain")):
        partly = output(module, inputs)
    assert not torch.equal(partly, awake)
    assert not torch.equal(partly, asleep)
