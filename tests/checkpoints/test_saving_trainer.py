"""A checkpoint holds the run of the Trainer that saves it, whatever other Trainers have done with the module since."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

import lightning_lora as ll
from lightning_lora import LoRAConfig
from lightning_lora.callbacks import CheckpointGuard, FiniteGradients, GracefulStop, LoRA, LoRAGuard, RankWatch, RunLock
from lightning_lora.checkpoints.resume import RESUME_KEY
from tests.support import toys
from tests.support.toys import Plain, Toy

pytestmark = toys.expected_warnings


def test_module(module: LightningModule, folder: Path) -> None:
    toys.trainer(folder).test(module, toys.loader(), verbose=False)


def validate(module: LightningModule, folder: Path) -> None:
    toys.trainer(folder).validate(module, toys.loader(), verbose=False)


def predict(module: LightningModule, folder: Path) -> None:
    module.predict_step = lambda batch, batch_idx: module(batch[0])  # pyright: ignore[reportAttributeAccessIssue]
    toys.trainer(folder).predict(module, toys.loader())


test_module.__test__ = False  # pyright: ignore[reportFunctionMemberAccess]


@pytest.mark.parametrize("between", [test_module, validate, predict], ids=lambda each: each.__name__)
@pytest.mark.parametrize("callback", [False, True])
def test_it_saves_what_it_would_have_saved_before(
    callback: bool, between: Callable[[LightningModule, Path], None], tmp_path: Path
) -> None:
    module = Plain() if callback else Toy()
    options: dict[str, Any] = {"callbacks": [LoRA(LoRAConfig(rank=2))]} if callback else {}
    trainer = toys.fit(module, tmp_path, **options)
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    between(module, tmp_path)
    now = module.trainer
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert module.trainer is now
    before, after = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert RESUME_KEY in after
    assert after["optimizer_states"][0]["param_groups"] == before["optimizer_states"][0]["param_groups"]
    torch.testing.assert_close(after["optimizer_states"][0]["state"], before["optimizer_states"][0]["state"])
    assert toys.same(after["state_dict"], before["state_dict"])
    resumed = Plain() if callback else Toy()
    toys.fit(resumed, tmp_path, tmp_path / "after.ckpt", max_epochs=2, **options)


def test_each_of_two_trainers_saves_its_own_run(tmp_path: Path) -> None:
    module = Toy()
    first, second = toys.fit(module, tmp_path), toys.fit(module, tmp_path, max_epochs=2)
    for trainer, steps in ((first, 4), (second, 8)):
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        content = torch.load(tmp_path / "a.ckpt", weights_only=True)
        assert content["global_step"] == steps
        states = content["optimizer_states"][0]["state"]
        assert {int(state["step"]) for state in states.values()} == {steps}
        assert content[RESUME_KEY]["position"]["num_epochs"] == steps // 4


def test_a_trainer_that_is_used_once_more_saves_its_new_module(tmp_path: Path) -> None:
    one, other, trainer = Toy(), Toy(), toys.trainer(tmp_path)
    trainer.fit(one, toys.loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(other, toys.loader())
    one.trainer = None
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in state.items())


def test_after_removal_the_whole_module_is_saved_as_lightning_saves_it(tmp_path: Path) -> None:
    module = Toy()
    trainer = toys.fit(module, tmp_path)
    module.merge_lora()
    with pytest.raises(ll.ConfigError, match=r"cannot save a checkpoint.*unmerge_lora"):
        trainer.save_checkpoint(tmp_path / "merged.ckpt")
    ll.remove_lora(module)
    trainer.save_checkpoint(tmp_path / "removed.ckpt")
    content = torch.load(tmp_path / "removed.ckpt", weights_only=True)
    fresh = Plain()
    fresh.load_state_dict(content["state_dict"])
    assert toys.same(toys.snapshot(fresh), toys.snapshot(module))
    assert content["optimizer_states"][0]["param_groups"][0]["params"] == [0, 1, 2, 3]


def test_a_finished_trainer_can_be_copied_and_pickled(tmp_path: Path) -> None:
    import copy
    import pickle

    trainer = toys.fit(Toy(), tmp_path)
    for twin in (copy.deepcopy(trainer), pickle.loads(pickle.dumps(trainer))):
        assert isinstance(twin, Trainer)
        twin.save_checkpoint(tmp_path / "twin.ckpt")
        save: Any = twin.save_checkpoint
        assert save.args[0] is twin


def test_callbacks_that_have_served_another_trainer_since_do_not_mix_the_runs(tmp_path: Path) -> None:
    callbacks = [LoRAGuard(), CheckpointGuard(), FiniteGradients(), GracefulStop(), RankWatch(), RunLock()]
    module = Toy()
    first = toys.fit(module, tmp_path, callbacks=callbacks)
    toys.fit(Toy(), tmp_path, callbacks=callbacks, max_epochs=2)
    toys.trainer(tmp_path, callbacks=callbacks).validate(module, toys.loader(), verbose=False)
    first.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["global_step"] == 4
    assert content[RESUME_KEY]["position"]["num_epochs"] == 1
    resumed = Toy()
    assert toys.fit(resumed, tmp_path, tmp_path / "a.ckpt", callbacks=callbacks, max_epochs=2).global_step == 8


def test_a_stand_in_of_the_user_for_saving_is_called_as_it_is(tmp_path: Path) -> None:
    trainer, calls = toys.trainer(tmp_path), []
    trainer.save_checkpoint = stand_in = lambda *path, **options: calls.append(path)
    trainer.fit(Toy(), toys.loader())
    assert trainer.save_checkpoint is stand_in
    trainer.save_checkpoint("here")
    assert calls[-1] == ("here",)
