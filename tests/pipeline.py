"""Running the command line as a user does: a process of its own, its state under a root."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pytest

SHORT = ("--epochs", "4", "--checkpoint-every", "10", "--importance-samples", "5", "--count", "16")


def command(*arguments: object, root: Path) -> list[str]:
    return [sys.executable, "-m", "flows.cli", *map(str, arguments), "--root", str(root)]


def environment() -> dict[str, str]:
    """The user's environment: only the session's Prefect server is kept, MLflow goes under the root."""
    dropped = ("MLFLOW_TRACKING_URI", "PREFECT_API_DATABASE_CONNECTION_URL")
    return {name: value for name, value in os.environ.items() if name not in dropped}


def run(*arguments: object, root: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*arguments, root=root), capture_output=True, text=True, env=environment())
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@contextmanager
def registry_of(root: Path) -> Iterator[mlflow.MlflowClient]:
    """MLflow of this process keeps its runs and models under the root, for the block alone."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{root}/mlflow.db")
    try:
        yield mlflow.MlflowClient()
    finally:
        mlflow.set_tracking_uri(before)


def run_json(*arguments: object, root: Path) -> dict[str, Any]:
    return json.loads(run(*arguments, "--json", root=root).stdout)


def signal_at(pattern: str, number: signal.Signals, *arguments: object, root: Path) -> tuple[int, str]:
    """Run a command and send it a signal the moment a log line holds the pattern: exit code and log."""
    # A test worker ignores SIGINT, and what it starts would inherit that.
    process = subprocess.Popen(
        ["env", "--default-signal=INT", *command(*arguments, root=root)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stderr is not None
    guard = threading.Timer(300, process.kill)
    guard.start()
    log, sent = "", False
    for line in process.stderr:
        log += line
        if not sent and pattern in line:
            process.send_signal(number)
            sent = True
    guard.cancel()
    assert sent, f"{pattern!r} was never logged:\n{log}"
    return process.wait(), log


def until(seconds: float, ready: Callable[[], Any]) -> Any:
    """What `ready` gives once it gives something."""
    end = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < end, f"not within {seconds:g} s"
        time.sleep(1)
    return found


@contextmanager
def prefect_server_with_scheduler(folder: Path) -> Iterator[str]:
    """A Prefect server that starts what is due, for this process and the commands it starts; its URL."""
    from prefect.events.worker import EventsWorker
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.local_server import local_server

    patch = pytest.MonkeyPatch()
    patch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{folder}/prefect.db")
    EventsWorker.drain_all()  # the thread that sends events stays with the server that it first met
    with local_server(services=True) as url, temporary_settings({PREFECT_API_URL: url}):
        patch.setenv("PREFECT_API_URL", url)
        yield url
        EventsWorker.drain_all()
    patch.undo()
