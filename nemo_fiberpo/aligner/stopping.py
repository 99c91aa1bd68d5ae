"""The end of a run that a signal or its time limit stops, by what there is to save."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from nemo_fiberpo.aligner import launch
from nemo_fiberpo.aligner.lifecycle import preemption


def stop_before_training(restored: Mapping[str, int] | None) -> None:
    """End the run here if a rank got a signal: there is nothing to save. Collective."""
    reason = preemption.agreed_reason()
    if reason is not None:
        at = f"RL step {restored['step']}" if restored else "the start"
        _say(f"stopped by {reason} before training: nothing to save; the same command goes on from {at}")
        raise preemption.Stopped


def stop_in_training(
    reason: str, fiberpo: Any, save_interval: int, finish_saves: Callable[..., Any] | None
) -> NoReturn:
    """End the run after an RL step, saved: by `fit` where it saves at all, else here, since whoever starts the run
    again counts on its progress. Collective.

    save_interval  `algorithm.save_interval`; with 0 `fit` saves nothing
    finish_saves   completes saves that are under way; None where there is no checkpoint callback, so that nothing can
                   be saved: then the run has failed, and starting it again would repeat it from its beginning
    """
    at = f"stopped by {reason} at RL step {fiberpo.step} of {fiberpo.max_steps}"
    if finish_saves is None:
        _say(
            f"error: {at}: nothing is saved, exp_manager.create_checkpoint_callback is false; the same command begins "
            "again"
        )
        raise preemption.Stopped(can_go_on=False)
    if save_interval == 0:
        fiberpo.save()
        finish_saves(blocking=True)
    _say(f"{at}: checkpoint saved; the same command goes on from here")
    raise preemption.Stopped


def _say(line: str) -> None:
    if launch.is_first_rank():
        print(line, flush=True)
