"""`vae-flows train --devices 2`: torch's launcher, two processes on the CPU, one of them lost on the way."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pipeline import command, environment, registry_of, run, run_json
from sockets import beyond_loopback

import vae
from flows.jobs import job_store
from flows.watch import read_history

SHORT = ("train", "--epochs", "6", "--checkpoint-every", "10", "--device", "cpu")
TWO = (*SHORT, "--devices", "2")


def ranks_of(parent: int) -> list[int]:
    """The processes of `flows.rank` below a process; the launcher itself also has it in its command line."""
    found, generation = [], [parent]
    while generation:
        children = [
            int(child)
            for pid in generation
            for child in subprocess.run(
                ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True
            ).stdout.split()
        ]
        found += [
            pid
            for pid in children
            if b"torch.distributed.run" not in cmdline(pid) and b"flows.rank" in cmdline(pid)
        ]
        generation = children
    return found


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def train_and_lose_a_rank(root: Path) -> str:
    """The log of a training one of whose ranks is killed at its second checkpoint."""
    process = subprocess.Popen(
        command(*TWO, root=root),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )
    assert process.stderr is not None
    log, killed = "", False
    for line in process.stderr:
        log += line
        if not killed and "train: checkpoint at step 20" in line:
            os.kill(ranks_of(process.pid)[-1], signal.SIGKILL)
            killed = True
        elif killed and "train: checkpoint" in line:  # the ranks have met again
            assert beyond_loopback(process.pid) == set()
    assert process.wait() == 0, log
    assert killed, log
    return log


@pytest.mark.slow
def test_a_lost_rank_restarts_all_from_the_checkpoint(tmp_path: Path, prefect_server: str) -> None:
    log = train_and_lose_a_rank(tmp_path / "lost")
    assert "resuming from checkpoints/" in log
    lost, whole, one = (
        run_json(*arguments, root=tmp_path / name)
        for arguments, name in ((TWO, "lost"), (TWO, "whole"), (SHORT, "one"))
    )
    assert lost["weights"] == whole["weights"]
    assert close(whole, one)
    watched = [epochs(tmp_path / name, whole["job"]) for name in ("lost", "whole")]
    assert [epoch["step"] for epoch in watched[1]] == [23, 46, 69, 92, 115, 138]
    assert watched[0] == watched[1]
    with registry_of(tmp_path / "whole") as client:
        active = client.get_metric_history(whole["run_id"], "validation/active_units")
        pictures = {file.path.split("+")[0] for file in client.list_artifacts(whole["run_id"], "images")}
    assert [metric.value for metric in active] == [epoch["active_units"] for epoch in watched[1]]
    assert pictures == {"images/reconstructions", "images/samples"}


def epochs(root: Path, job: str) -> list[dict[str, Any]]:
    """What was watched after each epoch of a training."""
    return read_history(job_store(root, job))["epochs"]


def close(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two results have the same weights but for rounding."""
    ours, theirs = (vae.load(result["bundle"]).state_dict() for result in (first, second))
    return all((ours[name] - theirs[name]).abs().max() < 1e-2 for name in ours)


def test_more_devices_than_there_are_is_refused_before_any_work(tmp_path: Path) -> None:
    refused = run("train", "--device", "cuda", "--devices", "99", root=tmp_path / "new", code=2)
    assert "devices=99, but torch finds" in refused.stderr
    assert not (tmp_path / "new").exists()
