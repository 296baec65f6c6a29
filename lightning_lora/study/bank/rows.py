"""Arms that train side by side in one batch: they meet where they call the base, and where they go backward."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_lora.study.bank.exactness import why_no_rows, why_not_now
from lightning_lora.study.bank.joining import CannotJoinError
from lightning_lora.study.bank.joint_pass import Call, JointPass, backward, difference, equal_rows
from lightning_lora.study.bank.module_state import ModuleState
from lightning_lora.study.bank.process_state import ProcessState
from lightning_lora.study.bank.shared_base import storage_of
from lightning_lora.study.bank.turns import Seat

_BACKWARD: Literal["backward"] = "backward"


class ArmRows:
    """What one arm has in passes of all arms."""

    def __init__(self, meeting: Meeting, seat: Seat, module: LightningModule, root: nn.Module) -> None:
        self.meeting = meeting
        self.seat = seat
        self.module = module
        self.root = root
        self.open: list[tuple[JointPass, int]] = []
        self.has_called = False

    def begin(self) -> None:
        """Let the calls of the base in this batch go to the meeting."""
        if not self.meeting.why_not and (reason := self._why_not()):
            self.meeting.give_up(reason)
        if self.meeting.why_not:
            return
        self.has_called = False
        # Instance attributes: the module's class, which others share, stays as it is.
        self.root.__dict__["forward"] = self._forward
        self.module.__dict__["backward"] = self._backward

    def _why_not(self) -> str:
        """Why the calls of this arm cannot go to the meeting; "" if they can."""
        if not self.module.automatic_optimization:
            return "manual optimisation may go backward in its own way"
        if "forward" in self.root.__dict__ or "backward" in self.module.__dict__:
            return f"the forward of {type(self.root).__name__} or the backward of its task is replaced in the object"
        return ""

    def leave(self) -> bool:
        """Call the base directly again; returns whether calls went to the meeting."""
        self.open.clear()
        met = self.root.__dict__.get("forward") == self._forward  # not one that the user has put there
        if met:
            del self.root.__dict__["forward"], self.module.__dict__["backward"]
        return met

    def end(self) -> None:
        """The batch is over."""
        if self.leave() and not self.has_called:
            self.meeting.give_up(f"training_step does not call the forward of {type(self.root).__name__}")

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        kind: Any = type(self.root)
        plain = partial(kind.forward, self.root, *args, **kwargs)
        if not torch.is_grad_enabled():
            return plain()
        self.has_called = True
        if self.meeting.why_not:
            return plain()
        call = Call(self.root, args, kwargs)
        self.seat.meet((self, call), self.meeting.serve)
        if call.error is not None:
            raise call.error
        return plain() if call.is_alone else call.output

    def _backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        kind: Any = type(self.module)
        if len(self.open) > 1:
            # Calls of which one is made from the output of another have a part of the graph in common.
            kwargs = {"retain_graph": True, **kwargs}
        kind.backward(self.module, loss, *args, **kwargs)
        if self.open:
            call = Call(self.root, (), {}, output=_BACKWARD)
            self.seat.meet((self, call), self.meeting.serve)
            if call.error is not None:
                raise call.error


class Meeting:
    """Makes one pass of the calls of several arms, as soon as all of them wait.

    Attributes:
        why_not: Why arms take turns after all; "" as long as they share batches.
        num_joint: Number of passes with several arms.
        num_alone: Number of calls that could not be joined.
        last_reason: Why the last of these could not.
    """

    def __init__(self) -> None:
        self.why_not = ""
        self.num_joint = self.num_alone = 0
        self.last_reason = ""
        # Shapes of the input to how many rows of theirs layers take for one of it, where the joint pass is right.
        self._checked: dict[Any, list[int]] = {}

    def give_up(self, reason: str) -> None:
        """Let arms take turns from now on."""
        self.why_not = self.why_not or reason

    def serve(self, seats: Sequence[Seat]) -> None:
        """Do the backward passes of the arms that wait for one; if there are none, the forward passes."""
        began = time.perf_counter()
        backwards = [seat for seat in seats if seat.waits_for[1].output is _BACKWARD]
        served = backwards or list(seats)
        arms, calls = [seat.waits_for[0] for seat in served], [seat.waits_for[1] for seat in served]
        for call in calls:
            call.output = None
        try:
            if backwards:
                self._backward(arms)
            else:
                self._forward(arms, calls)
        except Exception as error:  # such as memory that is full: it happened to all of them
            for call in calls:
                call.error = error
        for seat in served:
            seat.waits_for = None
        self._charge(served, time.perf_counter() - began)

    @staticmethod
    def _charge(served: Sequence[Seat], seconds: float) -> None:
        working = [seat for seat in served[0].turns.seats if seat.has_turn]
        for seat in served:
            seat.charge(seconds / len(served))
        for seat in working:
            seat.charge(-seconds)

    def _forward(self, arms: Sequence[ArmRows], calls: Sequence[Call]) -> None:
        reason = self.why_not
        if len(calls) > 1 and not reason and not self._checked:
            self.give_up(next(filter(None, (why_no_rows(arm.root) for arm in arms)), ""))
            reason = self.why_not
        if len(calls) > 1 and not reason:
            reason = next(filter(None, (why_not_now(arm.root) for arm in arms)), "")
        if len(calls) > 1 and not reason:
            try:
                if not self._checked:
                    self._check(arms, calls)
                made = self._made(arms, calls)
                made.hand_out()
                for place, arm in enumerate(arms):
                    arm.open.append((made, place))
                self.num_joint += 1
                return
            except CannotJoinError as error:
                reason = str(error)
        for call in calls:
            call.is_alone = True
        self.num_alone += len(calls) if reason else 0
        self.last_reason = reason or self.last_reason

    def _made(self, arms: Sequence[ArmRows], calls: Sequence[Call]) -> JointPass:
        """A joint pass in which each layer takes the rows that it took when such a pass was checked."""
        made = JointPass(calls)
        if made.rows.multiples and made.shape not in self._checked:
            self._check(arms, calls)
        if made.rows.multiples != self._checked.setdefault(made.shape, made.rows.multiples):
            raise CannotJoinError("its layers take a choice of rows, not all of them")
        return made

    def _check(self, arms: Sequence[ArmRows], calls: Sequence[Call]) -> None:
        """Compare a joint pass with the arms alone, and take turns for good if it differs."""
        reason = _not_shared([arm.root for arm in arms])
        process, states = ProcessState(), [ModuleState(arm.root) for arm in arms]
        try:
            if not reason:
                made = JointPass(calls)
                reason = difference(made) or difference(JointPass(equal_rows(calls)))
                self._checked[made.shape] = made.rows.multiples
        except CannotJoinError as error:
            if "rows of different lengths" not in str(error):
                self.give_up(str(error))
            raise
        finally:
            process.restore()
            changed = next(filter(None, (state.changed() for state in states)), "")
            for state in states:
                state.restore()
            if changed:
                self.give_up(f"its forward changes {changed} in training")
        if reason or self.why_not:
            self.give_up(reason)
            raise CannotJoinError(self.why_not)

    @staticmethod
    def _backward(arms: Sequence[ArmRows]) -> None:
        passes: dict[int, tuple[JointPass, list[int]]] = {}
        for arm in arms:
            for made, place in arm.open:
                passes.setdefault(id(made), (made, []))[1].append(place)
            arm.open = []
        others = [seat.waits_for[0] for seat in arms[0].seat.turns.seats if seat.waits_for is not None]
        awaited = {id(made) for other in others for made, _ in other.open}
        in_order = sorted(passes.values(), key=lambda each: each[0].number)
        backward(in_order, is_last=not awaited & set(passes))


def _not_shared(roots: Sequence[nn.Module]) -> str:
    """Why the bases of arms are not one; "" if they are."""
    names = [[name for name, _ in root.named_modules()] for root in roots]
    frozen = [{n: p for n, p in root.named_parameters() if not p.requires_grad} for root in roots]
    if any(other != names[0] for other in names):
        return "arms have models of different structure"
    for name, weight in frozen[0].items():
        if any(name in other and storage_of(other[name]) != storage_of(weight) for other in frozen[1:]):
            return f"the frozen weight {name} is not the same in all arms"
    return ""
