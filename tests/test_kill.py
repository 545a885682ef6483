"""`kill -9` inside each step of retrain, then the same command: as if it had never been stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from pipeline import SHORT, environment, run_json, signal_at

import vae

# A step's own log lines, two or more of each, in the order of the flow.
MOMENTS = (
    "ingest: reading",
    "ingest: snapshot",
    "train: 1451 images",
    "train: checkpoint at step 10",
    "train: checkpoint at step 40",
    "evaluate: 177 test images",
    "evaluate: elbo",
    "register: train-",
    "register: vae-digits version",
    "gate: judging",
    "gate: vae-digits version 1 is champion",
    "encode: snapshot:",
    "encode: 1797 rows written",
    "sample: 16 images",
    "sample: 16 rows written",
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> dict[str, Any]:
    return run_json("retrain", *SHORT, root=tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> tuple[Path, dict[str, Any]]:
    """A root on which retrain was killed at every moment in turn, and the result of the last run."""
    root = tmp_path_factory.mktemp("killed")
    for moment in MOMENTS:
        code, log = signal_at(moment, signal.SIGKILL, "retrain", *SHORT, root=root)
        assert code == -signal.SIGKILL, log
    return root, run_json("retrain", *SHORT, root=root)


def test_the_weights_are_bitwise_those_of_an_undisturbed_run(
    undisturbed: dict[str, Any], killed: tuple[Path, dict[str, Any]]
) -> None:
    _, result = killed
    assert result["trained"]["weights"] == undisturbed["trained"]["weights"]
    assert result["scores"]["scores"] == undisturbed["scores"]["scores"]


def test_one_version_and_one_run(killed: tuple[Path, dict[str, Any]]) -> None:
    root, _ = killed
    client = mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db", f"sqlite:///{root}/mlflow.db")
    assert [str(v.version) for v in client.search_model_versions("name = 'vae-digits'")] == ["1"]
    assert str(client.get_model_version_by_alias("vae-digits", "champion").version) == "1"
    runs = client.search_runs(["1"])
    assert [run.info.status for run in runs] == ["FINISHED"]
    history = client.get_metric_history(runs[0].info.run_id, "validation/elbo")
    assert [metric.step for metric in history] == [23, 46, 69, 92]
    names = {artifact.path for artifact in client.list_artifacts(runs[0].info.run_id)}
    assert {"gate.json", "latents.json", "samples.json", "samples.png", "evaluation-test.json"} <= names
    assert {"test/elbo", "encode/rows", "sample/rows", "ingest/train"} <= set(runs[0].data.metrics)


def test_no_row_is_lost_or_doubled(undisturbed: dict[str, Any], killed: tuple[Path, dict[str, Any]]) -> None:
    _, result = killed
    for name, rows in (("latents", 1797), ("samples", 16)):
        found, expected = (pd.read_parquet(r[name]["uri"]) for r in (result, undisturbed))
        assert len(found) == rows
        assert found["id"].is_unique
        column = "mu" if name == "latents" else "z"
        np.testing.assert_array_equal(np.stack(found[column]), np.stack(expected[column]))


def test_no_half_written_file_stays_in_a_table(killed: tuple[Path, dict[str, Any]]) -> None:
    _, result = killed
    for name in ("latents", "samples"):
        assert len(list(Path(result[name]["uri"]).rglob("part-*"))) == 1
    assert vae.load(result["trained"]["bundle"]).latent_dim == 16


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_polite_signal_leaves_a_checkpoint_and_a_run_to_resume(
    number: signal.Signals, code: int, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    command = ("train", *SHORT[:2], "--checkpoint-every", 10)
    found, log = signal_at("train: checkpoint at step 10", number, *command, root=tmp_path)
    assert found == code, log
    assert "stopping with a checkpoint" in log
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert [run.info.status for run in client.search_runs(["1"])] == ["KILLED"]
    result = run_json(*command, root=tmp_path)
    assert result["weights"] == undisturbed["trained"]["weights"]
    assert [run.info.status for run in client.search_runs(["1"])] == ["FINISHED"]
    assert json.loads(json.dumps(result))["changed"]


HALF = 400_000  # bytes of MLflow's database when it is about half made
TRACK = """
import sys
from pathlib import Path
from flows.config import Rollback
from flows.tracking import tracked
with tracked(Rollback(root=Path(sys.argv[1]), name="vae")) as run:
    print(run.id)
"""


def test_mlflows_tables_are_made_whole(tmp_path: Path) -> None:
    """Half made, it would refuse them for ever."""
    line = [sys.executable, "-c", TRACK, str(tmp_path)]
    first = subprocess.Popen(line, env=environment())
    made = [tmp_path / "mlflow.part", tmp_path / "mlflow.db"]
    while sum(file.stat().st_size for file in made if file.exists()) < HALF:
        assert first.poll() is None
        time.sleep(0.001)
    first.kill()
    first.wait()
    again = subprocess.run(line, capture_output=True, text=True, env=environment())
    assert again.returncode == 0, again.stderr
    assert [file.name for file in tmp_path.glob("mlflow.*")] == ["mlflow.db"]
