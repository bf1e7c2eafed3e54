"""How does a stage change what trains, or how fast, while it runs?

The schedule (warm-up, decay) is the whole stage's: a change sets the peaks that it multiplies, so a
part that joins late joins at the schedule's height there, without a warm-up of its own. The
optimizer holds a group for everything that trains at any time, so a change leaves the state of what
goes on training alone; the state of what is frozen is dropped, and if it trains again it starts
afresh. All of it follows from the number of steps done, so a resumed run needs no note of it.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerState

from train.freeze import Group


def phase_at(step: int, starts: Sequence[int]) -> int:
    """Return in which phase the step after `step` done ones is taken.

    Args:
        step: optimizer steps done.
        starts: steps done when each phase begins, the first 0.
    """
    return bisect_right(starts, step) - 1


def follow_phases(scheduler: LambdaLR, groups: Sequence[Group], starts: Sequence[int]) -> None:
    """Make the schedule multiply each phase's peak rates; 0 where a group is frozen."""
    schedules = scheduler.lr_lambdas
    assert len(schedules) == len(groups), (len(schedules), len(groups))
    scheduler.lr_lambdas = [
        _scaled(schedule, group, starts) for schedule, group in zip(schedules, groups, strict=True)
    ]
    held = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True)
    for (group, peak), schedule in zip(held, scheduler.lr_lambdas, strict=True):
        group["lr"] = peak * schedule(scheduler.last_epoch)


def _scaled(
    schedule: Callable[[int], float], group: Group, starts: Sequence[int]
) -> Callable[[int], float]:
    """Return a group's schedule, relative to the peak that the optimizer has of it."""
    peaks = [setting.learning_rate if setting else 0.0 for setting in group.phases]

    def scaled(step: int) -> float:
        return schedule(step) * peaks[phase_at(step, starts)] / group.learning_rate

    return scaled


class PhaseSwitch(TrainerCallback):
    """Before a phase's first step: freezes what it freezes, and lets the rest learn.

    Args:
        groups: from `train.freeze.freeze`, in the order of the optimizer's.
        starts: see `phase_at`.
        weight_decay: the stage's own.
    """

    def __init__(self, groups: Sequence[Group], starts: Sequence[int], weight_decay: float) -> None:
        self.groups = groups
        self.starts = starts
        self.weight_decay = weight_decay
        self.phase: int | None = None

    def on_step_begin(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        phase = phase_at(state.global_step, self.starts)
        if phase != self.phase:
            self._enter(phase, model, kwargs["optimizer"])
            self.phase = phase

    def _enter(self, phase: int, model: nn.Module, optimizer: Any) -> None:
        parameters = dict(model.named_parameters())
        for group, held in zip(self.groups, optimizer.param_groups, strict=True):
            held["weight_decay"] = group.weight_decay(phase, self.weight_decay)
            trains = group.phases[phase] is not None
            for parameter in (parameters[name] for name in group.names):
                parameter.requires_grad_(trains)
                if not trains:
                    parameter.grad = None
                    optimizer.state.pop(parameter, None)
