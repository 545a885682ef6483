"""MLflow away: a real server behind a proxy that refuses, delays, answers 503 or loses answers."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults import bodies
from tests.faults.proxy import FATES, Fate, Proxy
from tests.faults.trials import Child, Experiment, Found, found_in_child, in_child, unless

REQUESTS = 120  # that a retrain makes, about
LONGEST = 6  # requests in a row that meet an outage


def listener() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def serve_from(folder: Path, shared: Path) -> None:
    """A database for the server, with MLflow's tables and nothing in them."""
    (folder / "server").mkdir()
    shutil.copy(shared / "empty/mlflow.db", folder / "server/server.db")


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """MLflow's own application on SQLite under the folder; its host:port."""
    held = listener()

    def serve() -> None:
        import uvicorn

        os.environ |= {
            "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder}/server.db",
            "_MLFLOW_SERVER_REGISTRY_STORE": f"sqlite:///{folder}/server.db",
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "artifacts"),
        }
        from mlflow.server.fastapi_app import app

        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[held])

    child = Child(serve, folder / "server.log")
    address = "{}:{}".format(*held.getsockname())
    held.close()
    try:
        yield address
    finally:
        child.end()


@contextmanager
def proxied(target: str, fate: Fate, log: Path) -> Iterator[str]:
    """The proxy in a process of its own; its URL."""
    held = listener()
    child = Child(lambda: Proxy(target, fate, fd=held.fileno()).serve_forever(), log)
    url = "http://{}:{}".format(*held.getsockname())
    held.close()
    try:
        yield url
    finally:
        child.end()


def _retrain(root: Path, url: str, **environment: str) -> dict[str, Any]:
    os.environ |= {"MLFLOW_TRACKING_URI": url, **environment}
    return bodies.retrain(root)


def batch(seed: int, folder: Path, shared: Path) -> Found:
    """One retrain through one outage, which begins at some request and meets a few in a row."""
    rng = np.random.default_rng(seed)
    kind = FATES[seed % len(FATES)]
    first, length = int(rng.integers(1, REQUESTS)), int(rng.integers(1, LONGEST))
    return through(
        folder, shared, lambda method, number: kind if first <= number < first + length else "pass"
    )


def whole_training(seed: int, folder: Path, shared: Path) -> Found:
    """Away from the first checkpoint until the training is committed: one that waited would never end."""
    kind, jobs = ("cut", "503", "swallow")[seed % 3], folder / "root/jobs"

    def fate(method: str, number: int) -> str:
        training = list(jobs.glob("train-*/checkpoints/*")) and not list(jobs.glob("train-*/trained.json"))
        return kind if training else "pass"

    return through(folder, shared, fate)


def through(folder: Path, shared: Path, fate: Fate) -> Found:
    """A retrain through the proxy, compared with the undisturbed one."""
    serve_from(folder, shared)
    with mlflow_server(folder / "server") as address:
        with proxied(address, fate, folder / "log") as url:
            result = in_child(lambda: _retrain(folder / "root", url), folder / "log").given()
        return _compared(folder, shared, result, address)


def never_returns(seed: int, folder: Path, shared: Path) -> Found:
    """Away for good from some request on: a clear end; once it is back, all goes on."""
    first = int(np.random.default_rng(seed).integers(1, REQUESTS))
    serve_from(folder, shared)
    with mlflow_server(folder / "server") as address:

        def fate(method: str, number: int) -> str:
            return "cut" if number >= first else "pass"

        with proxied(address, fate, folder / "log") as url:
            ended = in_child(lambda: _retrain(folder / "root", url, VAE_FLOWS_PATIENCE="2"), folder / "log")
        clear = ended.code == 1 and "the same command" in str(ended.value) and "MLflow" in str(ended.value)
        found = Found() + unless(clear, f"from request {first} on: ended with {ended.code}, {ended.value}")
        result = in_child(lambda: _retrain(folder / "root", f"http://{address}"), folder / "log").given()
        return found + _compared(folder, shared, result, address)


def _compared(folder: Path, shared: Path, result: dict[str, Any], address: str) -> Found:
    facts = json.loads((shared / "facts.json").read_text())
    look = lambda: bodies.compared(folder / "root", result, facts, f"http://{address}")  # noqa: E731
    return Found() + found_in_child(look, folder / "log")


IMPORTS = (*bodies.IMPORTS, "mlflow.server.fastapi_app", "uvicorn")
EXPERIMENTS = (
    Experiment(
        "MLflow down, slow, 5xx, answers lost",
        "An outage of a few requests anywhere in a retrain: nothing lost or doubled.",
        goal=60,
        batch=batch,
        prepare=bodies.prepare,
        imports=IMPORTS,
        quick=False,
    ),
    Experiment(
        "MLflow away for all of a training",
        "Training goes on; its metrics wait on disk with their own times, and arrive once.",
        goal=10,
        batch=whole_training,
        prepare=bodies.prepare,
        imports=IMPORTS,
    ),
    Experiment(
        "MLflow away for good",
        "A clear end after our patience; the same command goes on when it is back.",
        goal=10,
        batch=never_returns,
        prepare=bodies.prepare,
        imports=IMPORTS,
        quick=False,
    ),
)
