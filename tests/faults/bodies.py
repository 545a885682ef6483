"""SIGKILL in the steps' bodies: the whole of retrain in a forked process, without Prefect's engine.

The flows' own code runs, from ingest to sample, with MLflow's files under the root; only the engine around
it is left out, which `command.py` has. So an attempt costs a CPU second, and hundreds can be killed.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults.trials import (
    NOTHING,
    Child,
    Ended,
    Experiment,
    Found,
    counted,
    found_in_child,
    in_child,
    unless,
)

KILLS = 10  # a batch
MOMENT = 0.5  # CPU seconds into an attempt at which it is killed, on average; undisturbed it takes four
ROWS = 400
SETTINGS: dict[str, Any] = {
    "source": "digits",
    "limit": ROWS,
    "count": 16,
    "importance_samples": 5,
    "shard_rows": 100,
    "model": {"model": "flat", "network": "mlp", "latent_dim": 4},
    "training": {"epochs": 3, "batch_size": 32, "checkpoint_every": 4},
}
LOADED_LATE = {"torch", "mlflow", "scipy", "sklearn", "pyarrow", "pandas", "matplotlib", "sqlalchemy", "PIL"}
IMPORTS = (
    "flows.retrain",
    "mlflow",
    "sklearn.datasets",
    "pandas",
    "data.upkeep",
    "vae.train",
    "vae.evaluate",
)


def retrain(root: Path, **settings: Any) -> dict[str, Any]:
    """Retrain on `root`, from here: the facts of its result that an undisturbed run must equal."""
    without_engine()
    from flows.config import Retrain
    from flows.environment import prepare
    from flows.retrain import retrain as flow

    prepare(root)
    told = {k: v for k, v in SETTINGS.items() if k in Retrain.model_fields}
    result = flow(Retrain(root=root, **{**told, **settings})).model_dump(mode="json")
    scores = {name: one["value"] for name, one in result["scores"]["scores"].items()}
    tables = {name: result[name]["uri"] for name in ("latents", "samples")}
    return {"weights": result["trained"]["weights"], "scores": scores, "version": result["version"], **tables}


def without_engine() -> None:
    """Call flows and tasks as the functions that they are; events need a server, which is not here."""
    import logging

    from prefect import Flow, Task

    from flows import events

    for kind in (Flow, Task):
        kind.__call__ = lambda self, *a, **k: self.fn(*a, **k)
    for name in [name for name in sys.modules if name.startswith("flows.")]:
        if getattr(sys.modules[name], "emit", None) is events.emit and name != "flows.events":
            sys.modules[name].emit = lambda *a, **k: None  # type: ignore[attr-defined]
    events.emit = lambda *a, **k: None
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", force=True)


def prepare(shared: Path) -> None:
    """A root with MLflow's tables and nothing in them, and the facts of an undisturbed run."""
    from flows.environment import make_root
    from flows.environment import prepare as prepare_environment

    def undisturbed() -> dict[str, Any]:
        facts = retrain(shared / "undisturbed")
        (shared / "modules").write_text("\n".join(name for name in sys.modules if _importable(name)))
        return {**facts, **recorded(shared / "undisturbed")}

    def empty() -> None:
        prepare_environment(shared / "empty")
        make_root(shared / "empty")
        from flows.tracking import client

        client().search_experiments()

    in_child(empty, shared / "log").given()
    shutil.copytree(shared / "empty", shared / "undisturbed")
    ended = in_child(undisturbed, shared / "log")
    (shared / "facts.json").write_text(json.dumps(ended.given()))


def _importable(name: str) -> bool:
    """Whether the parent may import it too: a module of a library that flows load where they use it."""
    return name.partition(".")[0] in LOADED_LATE and not name.endswith("__main__")


def recorded(root: Path, uri: str = "") -> dict[str, Any]:
    """What MLflow and the tables hold: versions, runs, metrics by step, ids, values."""
    import mlflow

    from data.tables import open_table
    from data.upkeep import list_tables, verify

    uri = uri or f"sqlite:///{root.resolve()}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient(uri, uri)
    experiment = client.get_experiment_by_name("vae-flows")
    runs = client.search_runs([experiment.experiment_id])
    histories = {
        name: [metric.step for metric in client.get_metric_history(runs[0].info.run_id, name)]
        for name in sorted(runs[0].data.metrics)
        if not name.startswith("time/")  # of a step that was killed nobody knows it
    }
    tables = {}
    for info in list_tables(str(root)):
        verify(info.uri)
        tables[info.kind] = open_table(info.uri).rows
    return {
        "runs": [run.info.status for run in runs],
        "versions": [str(v.version) for v in client.search_model_versions("name = 'vae-digits'")],
        "champion": str(client.get_model_version_by_alias("vae-digits", "champion").version),
        "artifacts": sorted(a.path for a in client.list_artifacts(runs[0].info.run_id)),
        "histories": histories,
        "tables": tables,
    }


def batch(seed: int, folder: Path, shared: Path, most: int = KILLS) -> Found:
    """One root; kills at random moments of the CPU time that is left, each followed by the same command."""
    rng, facts = np.random.default_rng(seed), json.loads((shared / "facts.json").read_text())
    root = folder / "root"
    shutil.copytree(shared / "empty", root)
    kills, found = 0, NOTHING
    while kills < most:
        moment = rng.exponential(MOMENT)
        held = newest_checkpoint(root)
        ended = attempt(root, folder / f"attempt-{kills}", moment)
        found += resumed_at(held, folder / f"attempt-{kills}")
        if ended.code == 0:
            break
        kills += 1
    found += Found(trials=kills)
    result = in_child(lambda: retrain(root), folder / "log").given()
    return found + found_in_child(lambda: compared(root, result, facts), folder / "log")


def attempt(root: Path, log: Path, moment: float) -> Ended:
    """One attempt, killed after so many CPU seconds if it lives."""
    return Child(lambda: retrain(root), log).wait(kill_after=moment)


def newest_checkpoint(root: Path) -> str:
    """The newest checkpoint of a training that is not done, or ''."""
    found = sorted(root.glob("jobs/train-*/checkpoints/*.safetensors"))
    done = list(root.glob("jobs/train-*/trained.json"))
    return found[-1].name if found and not done else ""


def resumed_at(checkpoint: str, log: Path) -> Found:
    """An attempt that trains goes on from the newest checkpoint: at most one interval is taken again."""
    told = log.read_text(errors="replace") if log.exists() else ""
    trained = "train: checkpoint at step" in told
    resumed = f"resuming from checkpoints/{checkpoint}" in told
    return unless(not checkpoint or not trained or resumed, f"training did not resume from {checkpoint}")


def compared(root: Path, result: dict[str, Any], facts: dict[str, Any], uri: str = "") -> Found:
    """A root that was disturbed, and MLflow at `uri`, beside those that were not."""
    here = recorded(root, uri)
    found = counted(here["versions"], facts["versions"]) + counted(here["artifacts"], facts["artifacts"])
    extra_runs = len(here["runs"]) - len(facts["runs"])
    found += Found(0, lost=max(-extra_runs, 0), duplicate=max(extra_runs, 0))
    for name, steps in facts["histories"].items():
        found += counted(
            [(name, step) for step in here["histories"].get(name, [])], [(name, step) for step in steps]
        )
    for part in ("weights", "scores", "version"):
        found += unless(result[part] == facts[part], f"{part} differ: {result[part]} is not {facts[part]}")
    found += unless(set(here["runs"]) == {"FINISHED"}, f"runs are {here['runs']}")
    for name, column in (("latents", "mu"), ("samples", "z")):
        found += same_rows(result[name], facts[name], column)
    return found


def same_rows(uri: str, expected: str, column: str) -> Found:
    """The same ids, and for each the same numbers to the bit."""
    import pandas as pd

    here, there = (pd.read_parquet(place).sort_values("id") for place in (uri, expected))
    found = counted(here["id"].tolist(), there["id"].tolist())
    same = len(here) == len(there) and np.array_equal(np.stack(here[column]), np.stack(there[column]))
    return found + unless(same, f"{column} of {uri} differ from an undisturbed run's")


EXPERIMENTS = (
    Experiment(
        "SIGKILL in the steps' bodies",
        "Killed at any moment of ingest, train, evaluate, register, gate, encode or sample, the same command "
        "ends as an undisturbed run: the same rows to the bit, one version, one run with each metric once, "
        "bitwise the same weights; at most one shard or checkpoint interval is done again.",
        goal=500,
        batch=batch,
        few={"most": 4},
        prepare=prepare,
        imports=IMPORTS,
    ),
)
