"""Secrets planted where users have them, and looked for in everything that a command leaves or says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import numpy as np

from tests.faults import bodies
from tests.faults.outages import listener, mlflow_server, proxied, serve_from
from tests.faults.trials import Experiment, Found, unless

SHORT = ("--epochs", "1", "--limit", "200", "--importance-samples", "2", "--count", "4")
LETTERS = np.array(list("abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"))


class Planted:
    """Random secrets, each known by where it was planted."""

    def __init__(self, rng: np.random.Generator):
        self._rng, self.known = rng, {}  # type: ignore[var-annotated]

    def __call__(self, where: str) -> str:
        secret = "".join(self._rng.choice(LETTERS, 24)) + ("/+" if "SECRET" in where else "")
        self.known[secret] = where
        return secret


def environment(planted: Planted, command: str) -> dict[str, str]:
    """Every variable in which the libraries take a secret, each with one of its own."""
    names = (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_SAS_KEY",
        "PREFECT_API_KEY",
        "POSTGRES_PASSWORD",
        "DATABRICKS_TOKEN",
        "HF_TOKEN",
    )
    return {name: planted(f"{name} of {command}") for name in names}


def batch(seed: int, folder: Path, shared: Path) -> Found:
    """Commands that end well and badly, with secrets in their environment and arguments; then a search."""
    planted = Planted(np.random.default_rng(seed))
    serve_from(folder, shared)
    with mlflow_server(folder / "server") as address, proxied(address, _refuse, folder / "log") as away:
        for number, (command, extra, code) in enumerate(commands(planted, address, away, folder)):
            name = f"{number}-{command[0]}"
            kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PREFECT_", "AWS_"))}
            line = [sys.executable, "-m", "flows.cli", *command, "--root", str(folder / "root")]
            done = subprocess.run(
                line, capture_output=True, env=kept | environment(planted, name) | extra, timeout=280
            )
            (folder / f"{name}.out").write_bytes(done.stdout + b"\n" + done.stderr)
            if done.returncode != code:
                said = done.stderr.decode(errors="replace")[-400:]
                return Found(broken=1, note=f"{name}: exit code {done.returncode}, {said}")
    return Found(trials=len(planted.known)) + sum(
        (searched(secret, where, folder) for secret, where in planted.known.items()), Found(0)
    )


def _refuse(method: str, number: int) -> str:
    return "cut"


def commands(
    planted: Planted, address: str, away: str, folder: Path
) -> list[tuple[list[str], dict[str, str], int]]:
    """Command, what its environment has beside the usual secrets, and the exit code that it should have."""
    port = listener().getsockname()[1]  # where nobody listens

    def mlflow(place: str, command: str) -> dict[str, str]:
        login = f"me:{planted(f'MLFLOW_TRACKING_URI of {command}')}"
        return {"MLFLOW_TRACKING_URI": f"http://{login}@{place}", "VAE_FLOWS_PATIENCE": "1"}

    def s3(where: str) -> str:
        return f"s3://{planted(where)}:{quote(planted(where), safe='')}@bucket/images"

    endpoint = {"AWS_ENDPOINT_URL": f"http://me:{planted('AWS_ENDPOINT_URL')}@127.0.0.1:{port}"}
    s3_away = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_REGION": "us-east-1"}
    prefect = {"PREFECT_API_URL": f"http://me:{planted('PREFECT_API_URL')}@127.0.0.1:{port}/api"}
    fine = mlflow(address, "retrain")
    encode = ["encode", "--model", "models:/vae-digits@champion", "--limit", "50"]
    return [
        (["retrain", *SHORT], fine, 0),
        (["retrain", *SHORT, "--seed", "1"], mlflow(away.removeprefix("http://"), "retrain away"), 1),
        (["ingest", "--source", f"folder:{s3('source')}"], {}, 2),
        (["ingest", "--source", "folder:s3://bucket/images"], endpoint, 2),
        ([*encode, "--out", s3("out")], fine, 2),
        ([*encode, "--source", f"idx:https://h/?token={planted('query')}"], fine, 2),
        (["pull", f"http://me:{planted('model')}@host/model", str(folder / "pulled")], fine, 2),
        (["doctor"], {**fine, **prefect, **s3_away}, 1),
    ]


def searched(secret: str, where: str, folder: Path) -> Found:
    """A secret in any file below the folder, as it is or as a URL has it."""
    forms = {secret.encode(), quote(secret, safe="").encode()}
    found = [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and any(form in path.read_bytes() for form in forms)
    ]
    return unless(not found, f"the secret of {where} is in {', '.join(found[:3])}")


EXPERIMENTS = (
    Experiment(
        "a secret planted",
        "In URIs of MLflow, Prefect, S3, in the environment and in arguments: in no log, parameter, tag, "
        "table, report or database afterwards.",
        goal=100,
        batch=batch,
        prepare=bodies.prepare,
        imports=(*bodies.IMPORTS, "mlflow.server.fastapi_app", "uvicorn"),
        quick=False,
        deadline=900,
    ),
)
