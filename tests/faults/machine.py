"""What a machine does to a run: its disk fills up, it is taken back with a SIGTERM."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults import bodies, rivals
from tests.faults.trials import Child, Experiment, Found, found_in_child, in_child, unless

NOTICE = 30.0  # seconds that a pre-empted machine gives


def size(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))


@contextmanager
def small_disk(place: Path, room: int) -> Iterator[None]:
    """A file system of so many bytes at `place`."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "none", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def lacks_mount() -> str:
    """Only root mounts."""
    return "" if os.geteuid() == 0 and shutil.which("mount") else "only root can mount a small file system"


def disk_full(seed: int, folder: Path, shared: Path) -> Found:
    """A disk that fills up somewhere in a retrain: an error names it; with more room it ends."""
    rng, facts = np.random.default_rng(seed), json.loads((shared / "facts.json").read_text())
    root = folder / "disk"
    low, high = size(shared / "empty"), size(shared / "undisturbed")
    room = int(rng.integers(low + (64 << 10), high))
    with small_disk(root, room):
        shutil.copytree(shared / "empty", root, dirs_exist_ok=True)
        ended = in_child(lambda: bodies.retrain(root), folder / "log")
        told = str(ended.value)
        found = unless(ended.code != 0 and str(root) in told, f"{room} bytes of {high}: {ended.code}, {told}")
        subprocess.run(["mount", "-o", f"remount,size={4 * high}", str(root)], check=True)
        result = in_child(lambda: bodies.retrain(root), folder / "log").given()
        return (
            Found() + found + found_in_child(lambda: failed_then_whole(root, result, facts), folder / "log")
        )


def failed_then_whole(root: Path, result: dict[str, Any], facts: dict[str, Any]) -> Found:
    """A run that FAILED is over, so the one that ended well is another, if anything was left to do."""
    statuses = _statuses(root)
    whole = unless(statuses.count("FINISHED") <= 1 and "RUNNING" not in statuses, f"runs are {statuses}")
    return whole + rivals.once(root, [result], facts)


def terminated(seed: int, folder: Path, shared: Path) -> Found:
    """A SIGTERM at a random moment: 143 within the notice, the run KILLED, then gone on with."""
    rng, facts = np.random.default_rng(seed), json.loads((shared / "facts.json").read_text())
    root = folder / "root"
    child = under_way(root, folder, shared, rng.uniform(0.3, 3.0))
    child.send(signal.SIGTERM)
    sent = time.monotonic()
    ended = child.wait(deadline=4 * NOTICE)
    took = time.monotonic() - sent
    found = Found(hung=int(took > NOTICE)) + unless(ended.code in (0, 143), f"{ended.code}: {ended.value}")
    if ended.code:
        statuses = in_child(lambda: _statuses(root), folder / "log").given()
        slow = "stays open" in (folder / "log").read_text(errors="replace")  # a starved machine; it says so
        found += unless(statuses in ([], ["KILLED"]) or slow, f"after SIGTERM runs are {statuses}")
    result = in_child(lambda: bodies.retrain(root), folder / "log").given()
    return found + found_in_child(lambda: bodies.compared(root, result, facts), folder / "log")


def under_way(root: Path, folder: Path, shared: Path, moment: float) -> Child:
    """A retrain that has taken so many CPU seconds; half as many where that is all of it."""
    shutil.copytree(shared / "empty", root)
    child = Child(lambda: _polite(root), folder / "log")
    while child.seconds() < moment and not child.over(0.01):
        pass
    if not child.over(0):
        return child
    child.wait().given()
    shutil.rmtree(root)
    return under_way(root, folder, shared, moment / 2)


def _polite(root: Path) -> Any:
    """A retrain with the command line's handler of SIGTERM."""
    from flows.commands import _terminate

    signal.signal(signal.SIGTERM, _terminate)
    return bodies.retrain(root)


def _statuses(root: Path) -> list[str]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")
    experiment = client.get_experiment_by_name("vae-flows")
    return [run.info.status for run in client.search_runs([experiment.experiment_id])] if experiment else []


EXPERIMENTS = (
    Experiment(
        "a disk full",
        "One error that names a path on it; with more room the same command ends as an undisturbed run.",
        goal=30,
        batch=disk_full,
        prepare=bodies.prepare,
        lacks=lacks_mount,
        imports=bodies.IMPORTS,
    ),
    Experiment(
        "SIGTERM",
        "A checkpoint at the end of the step, exit code 143 within 30 s, the run marked KILLED, then resumed "
        "under the same run.",
        goal=30,
        batch=terminated,
        prepare=bodies.prepare,
        imports=(*bodies.IMPORTS, "flows.commands"),
    ),
)
