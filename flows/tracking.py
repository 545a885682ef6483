"""One MLflow run for each command, begun when there is something to log, found again after a kill.

Flows log through a `Run`, never through MLflow's fluent API: nothing here depends on what is 'active' in a
thread. A flow called by another joins its run.
"""

from __future__ import annotations

import io
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flows.config import Command, to_toml
from flows.environment import make_root, prepare
from flows.jobs import digest, lock
from flows.results import Result

if TYPE_CHECKING:
    import mlflow

logger = logging.getLogger("vae_flows.tracking")
R = TypeVar("R", bound=Result)
JOB_TAG = "vae_flows.job"
# Set when a run has ended for good. Its status doesn't tell: MLflow's log_model sets FINISHED midway.
ENDED_TAG = "vae_flows.ended"
FLOW_RUN_TAG = "vae_flows.flow_run"  # Prefect's run of the latest attempt
CONFIG = "config.toml"  # the artifact that `--config` reads back
FLUSH_SECONDS = 2.0  # a batch of metrics costs 0.1 s, a single one 0.02 s
_active: ContextVar[Run | None] = ContextVar("run", default=None)


@contextmanager
def tracked(config: Command) -> Iterator[Run]:
    """The run of this command: the caller's, if there is one; closed with the outcome of the block."""
    if (outer := _active.get()) is not None:
        yield outer
        return
    prepare(config.root)  # a worker runs the flow without our command line
    make_root(config.root)
    run = Run(config)
    with lock(config.root, "tracking"):  # MLflow's first two users at once would both create its tables
        run.resume()
    token = _active.set(run)
    try:
        yield run
    except Exception as error:
        run.fail(error)
        raise
    except BaseException:  # Ctrl-C, SIGTERM: the same command goes on under the same run
        run.close("KILLED")
        raise
    else:
        run.close("FINISHED")
    finally:
        _active.reset(token)


class Run:
    """An MLflow run: that of an earlier attempt that was stopped, else one created on first use."""

    def __init__(self, config: Command):
        self._config = config
        self._id: str | None = None
        self.resumed = False
        self._pending: list[mlflow.entities.Metric] = []
        self._logged: dict[str, int] = {}
        self._flushed = time.monotonic()

    def resume(self) -> None:
        """Go on with the run of an earlier attempt at this command, if one was stopped on the way."""
        self._id = _unfinished(self._config)
        self.resumed = self._id is not None

    def wants(self, result: Result) -> bool:
        """Whether a result is to be logged: it was made now, or perhaps just before this run was stopped."""
        return result.changed or self.resumed

    @property
    def command(self) -> str:
        """The command whose run this is, which may be another than the flow that logs."""
        return type(self._config).__name__.lower()

    @property
    def id(self) -> str:
        """The run's id; creates the run if nothing has been logged yet."""
        if self._id is None:
            self._id = _create(self._config)
            logger.info("mlflow: run %s", self._id)
        return self._id

    def log_dataset(self, name: str, digest: str, source: str, split: str) -> None:
        """Name a data set, by its digest, as an input of the run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(name, digest[:36], "vae-flows", json.dumps({"uri": source}))
        client().log_inputs(self.id, [DatasetInput(dataset, [InputTag("mlflow.data.context", split)])])

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Buffer metrics of a step; those that an earlier attempt logged are not logged twice."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = {name: value for name, value in metrics.items() if step > self._last_step(name)}
        self._pending += [Metric(name, float(value), now, step) for name, value in new.items()]
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send what is buffered."""
        self._flushed = time.monotonic()
        while self._pending:
            client().log_batch(self.id, metrics=self._pending[:1000])
            del self._pending[:1000]

    def log_json(self, name: str, content: Any) -> None:
        """A small JSON artifact."""
        client().log_dict(self.id, content, name)

    def log_bytes(self, name: str, content: bytes) -> None:
        """A file of this content as an artifact; `name` may name a folder of artifacts too."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, Path(name).name)
            path.write_bytes(content)
            parent = str(Path(name).parent)
            client().log_artifact(self.id, str(path), None if parent == "." else parent)

    def log_image(self, name: str, png: bytes, step: int) -> None:
        """A picture of a step; MLflow shows those of one name with a slider over the steps."""
        from PIL import Image

        client().log_image(self.id, Image.open(io.BytesIO(png)), key=name, step=step)

    def sign(self, result: R) -> R:
        """A flow's result with the run's id, if there is a run."""
        return result.model_copy(update={"run_id": self._id})

    def fail(self, error: Exception) -> None:
        """End the run, created if need be, as FAILED, with the error's first line as a tag."""
        client().set_tag(self.id, "error", (str(error) or type(error).__name__).splitlines()[0][:500])
        self.close("FAILED")

    def close(self, status: str) -> None:
        """End the run, if it was ever begun."""
        if self._id is not None:
            self.flush()
            if status != "KILLED":
                client().set_tag(self._id, ENDED_TAG, status)
            client().set_terminated(self._id, status)

    def _last_step(self, name: str) -> int:
        if name not in self._logged:
            self._logged[name] = max((m.step for m in client().get_metric_history(self.id, name)), default=-1)
        return self._logged[name]


def client() -> mlflow.MlflowClient:
    """MLflow's client for the tracking server and registry of the environment."""
    import mlflow

    return mlflow.MlflowClient()


def _unfinished(config: Command) -> str | None:
    """The run of an earlier attempt at this command that was stopped on the way, reopened."""
    experiment = client().get_experiment_by_name(_experiment_name())
    if experiment is None:
        return None
    query = f"tags.`{JOB_TAG}` = '{_job(config)}'"
    runs = client().search_runs([experiment.experiment_id], query, order_by=["start_time ASC"])
    stopped = [run.info.run_id for run in runs if ENDED_TAG not in run.data.tags]
    if not stopped:
        return None
    client().update_run(stopped[0], status="RUNNING")
    for name, value in _flow_run().items():
        client().set_tag(stopped[0], name, value)
    return str(stopped[0])


def _create(config: Command) -> str:
    from mlflow.entities import Param

    command = type(config).__name__.lower()
    tags = {JOB_TAG: _job(config), **_flow_run()}
    run = client().create_run(_experiment(config.root), tags=tags, run_name=command)
    params = [Param(name, str(value)) for name, value in _flat(config.model_dump(mode="json")).items()]
    client().log_batch(run.info.run_id, params=params)
    client().log_text(run.info.run_id, to_toml(config.model_dump(mode="json")), CONFIG)
    return str(run.info.run_id)


def _flow_run() -> dict[str, str]:
    """The tag that names Prefect's run, inside of one."""
    from prefect.runtime import flow_run

    return {FLOW_RUN_TAG: flow_run.id} if flow_run.id else {}


def open_runs() -> dict[str, str]:
    """The runs that MLflow holds for running, and the Prefect run of each."""
    experiment = client().get_experiment_by_name(_experiment_name())
    if experiment is None:
        return {}
    runs = client().search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'")
    return {r.info.run_id: r.data.tags[FLOW_RUN_TAG] for r in runs if FLOW_RUN_TAG in r.data.tags}


def close(run_id: str, status: str, reason: str) -> None:
    """End a run whose process is gone; only one that is KILLED is gone on with by the same command."""
    client().set_tag(run_id, "error", reason[:500])
    if status != "KILLED":
        client().set_tag(run_id, ENDED_TAG, status)
    client().set_terminated(run_id, status)


@dataclass(frozen=True)
class Recorded:
    """What MLflow keeps of a run."""

    id: str
    config: str  # the command's settings as TOML; '' where they were not kept
    metrics: dict[str, float]
    url: str


def recorded(run_id: str) -> Recorded | None:
    """A run as it stands; None where it has been deleted."""
    import mlflow

    try:
        run = client().get_run(run_id)
    except mlflow.MlflowException:
        return None
    uri = mlflow.get_tracking_uri()
    server = uri.startswith(("http://", "https://"))
    url = f"{uri}/#/experiments/{run.info.experiment_id}/runs/{run_id}" if server else ""
    kept = {artifact.path for artifact in client().list_artifacts(run_id)}
    config = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/{CONFIG}") if CONFIG in kept else ""
    return Recorded(run_id, config, dict(run.data.metrics), url)


def _job(config: Command) -> str:
    return digest(type(config).__name__, config.model_dump(mode="json", exclude={"root"}))


def _experiment(root: Path) -> str:
    """The experiment's id; it is created if it is new."""
    import mlflow

    name = _experiment_name()
    if (found := client().get_experiment_by_name(name)) is not None:
        return str(found.experiment_id)
    # A tracking server knows where its artifacts go; without one they belong under the root.
    local = mlflow.get_tracking_uri().startswith("sqlite:")
    return str(client().create_experiment(name, (root.resolve() / "mlartifacts").as_uri() if local else None))


def _experiment_name() -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME", "vae-flows")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
