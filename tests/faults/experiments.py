"""Every experiment, in the order of the table."""

from __future__ import annotations

from tests.faults import (
    bodies,
    calls,
    collapse,
    command,
    hostile,
    leaks,
    machine,
    outages,
    rivals,
    rot,
    s3,
    training,
)
from tests.faults.trials import Experiment

EXPERIMENTS: tuple[Experiment, ...] = (
    *command.EXPERIMENTS,
    *bodies.EXPERIMENTS,
    *calls.EXPERIMENTS,
    *rivals.EXPERIMENTS,
    *machine.EXPERIMENTS,
    *training.EXPERIMENTS,
    *collapse.EXPERIMENTS,
    *rot.EXPERIMENTS,
    *s3.EXPERIMENTS,
    *outages.EXPERIMENTS,
    *hostile.EXPERIMENTS,
    *leaks.EXPERIMENTS,
)
