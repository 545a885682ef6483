"""One MLflow run for each command, begun when there is something to log, found again after a kill.

Flows log through a `Run`, never through MLflow's fluent API: nothing here depends on what is 'active' in a
thread. A flow called by another joins its run.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from flows.config import Command, to_toml
from flows.environment import local_mlflow, make_root, prepare
from flows.jobs import digest, lock, try_lock
from flows.results import Result
from flows.spool import MlflowAwayError, Patient, Spool, in_a_line, patience, patiently

if TYPE_CHECKING:
    import mlflow

logger = logging.getLogger("vae_flows.tracking")
R = TypeVar("R", bound=Result)
JOB_TAG = "vae_flows.job"
# Set when a run has ended for good. Its status doesn't tell: MLflow's log_model sets FINISHED midway.
ENDED_TAG = "vae_flows.ended"
FLOW_RUN_TAG = "vae_flows.flow_run"  # Prefect's run of the latest attempt
CONFIG = "config.toml"  # the artifact that `--config` reads back
ATTEMPT_TAG = "vae_flows.attempt"  # by which a run is found whose creation was not answered
BRIEF = 15.0  # seconds for MLflow when a run is stopped or fails: a pre-empted machine has 30
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
        _make_database(local_mlflow(config.root))
        run.resume()
    token = _active.set(run)
    try:
        yield run
    except Exception as error:
        run.fail(error)
        if (told := _with_place(error, config.root)) is not None:
            raise told from error
        raise
    except BaseException:  # Ctrl-C, SIGTERM: the same command goes on under the same run
        run.stop()
        raise
    else:
        run.finish()
    finally:
        _active.reset(token)
        run.release()


def _with_place(error: Exception, root: Path) -> Exception | None:
    """The error with the path that a full disk or SQLite does not tell; None for any other error."""
    import mlflow

    if isinstance(error, OSError) and error.errno and error.filename is None:
        return OSError(error.errno, error.strerror, str(root))
    uri = mlflow.get_tracking_uri()
    if "(sqlite3.OperationalError)" in str(error) and uri.startswith("sqlite:"):
        return RuntimeError(f"{uri}: {in_a_line(error)}")
    return None


def _make_database(path: Path) -> None:
    """MLflow's tables, all or none: killed while it makes them, it would never again accept what is there."""
    import mlflow

    if path.exists() or mlflow.get_tracking_uri() != f"sqlite:///{path}":
        return
    draft = path.with_suffix(".part")
    for left in path.parent.glob(f"{draft.name}*"):  # with SQLite's journal
        left.unlink()
    mlflow.MlflowClient(f"sqlite:///{draft}").search_experiments()
    os.replace(draft, path)


class Run:
    """An MLflow run: that of an earlier attempt that was stopped, else one created on first use."""

    def __init__(self, config: Command):
        self._config = config
        self._id: str | None = None
        self._spool: Spool | None = None
        self._held: Any = None
        self.resumed = False

    def resume(self) -> None:
        """Go on with the run of an earlier attempt at this command, if one was stopped on the way."""
        for run_id in _unfinished(self._config):
            if self._hold(run_id) and _reopen(run_id):
                _describe(run_id, self._config)
                self._id, self.resumed = run_id, True
                return

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
            self._hold(self._id)
            _describe(self._id, self._config)
            logger.info("mlflow: run %s", self._id)
        return self._id

    def begin(self) -> None:
        """Create the run now, so that nothing logged later waits for MLflow."""
        self._metrics()

    def log_dataset(self, name: str, digest: str, source: str, split: str) -> None:
        """Name a data set, by its digest, as an input of the run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        dataset = Dataset(name, digest[:36], "vae-flows", json.dumps({"uri": source}))
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", split)])]
        try:
            client().log_inputs(self.id, inputs)
        except MlflowException:
            # It looks for the data set and then inserts it: of two runs at once the later is refused, once.
            client().log_inputs(self.id, inputs)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Queue metrics of a step, never waiting for MLflow; a step that it has is not sent twice."""
        self._metrics().add(metrics, step)

    def flush(self) -> None:
        """Bring the metrics that MLflow does not have yet through a kill and a power cut."""
        self._metrics().sync()

    def drain(self) -> None:
        """Wait until MLflow has everything that was logged so far."""
        if self._spool is not None:
            self._spool.drain(patience())

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
        """Queue a picture of a step; MLflow shows those of one name with a slider over the steps."""
        self._metrics().add_picture(name, step, png)

    def sign(self, result: R) -> R:
        """A flow's result with the run's id, if there is a run."""
        return result.model_copy(update={"run_id": self._id})

    def fail(self, error: Exception) -> None:
        """End the run, created if need be, as FAILED, with the error's first line as a tag."""
        if not isinstance(error, MlflowAwayError):  # after which the same command goes on under this run
            self._briefly(lambda: self._end("FAILED", error=in_a_line(error)))

    def stop(self) -> None:
        """End the run, if it was ever begun, as KILLED: the same command goes on with it."""
        if self._id is not None:
            self._briefly(lambda: self._end("KILLED"))

    def finish(self) -> None:
        """End the run, if it was ever begun, once MLflow has every metric."""
        if self._id is not None:
            self._end("FINISHED")

    def release(self) -> None:
        """Let another process go on with what is left of the run."""
        if self._spool is not None:
            self._spool.close()
        if self._held is not None:
            self._held.release()

    def _end(self, status: str, **tags: str) -> None:
        run_id = self.id
        self._metrics().drain(patience())
        for name, value in tags.items():
            client().set_tag(run_id, name, value)
        _terminate(run_id, status)

    def _briefly(self, end: Callable[[], None]) -> None:
        """Try for a few seconds; what MLflow does not take then, the same command brings later."""
        ended = threading.Event()

        def attempt() -> None:
            try:
                end()
                ended.set()
            except Exception as error:
                logger.warning("mlflow: %s", in_a_line(error))

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(BRIEF)
        if not ended.is_set():
            logger.warning("mlflow: run %s stays open: the same command goes on with it", self._id)

    def _metrics(self) -> Spool:
        if self._spool is None:
            path = self._config.root.resolve() / "spool" / f"{self.id}.jsonl"
            self._spool = Spool(path, _AtMlflow(self.id, new=not self.resumed))
        return self._spool

    def _hold(self, run_id: str) -> bool:
        """Take the run for this process; False if another that lives has it."""
        self._held = try_lock(self._config.root, f"run-{run_id}")
        return self._held is not None


def client() -> mlflow.MlflowClient:
    """MLflow's client for the tracking server and registry of the environment; it waits for a server.

    A call that an outage cuts off is made again: `_create` and `registry.register` look first.
    """
    return cast("mlflow.MlflowClient", Patient(_client()))


def _client() -> mlflow.MlflowClient:
    import mlflow

    return mlflow.MlflowClient()


class _AtMlflow:
    """A run as the spool's receiver; a new one has no metric yet that could have arrived."""

    def __init__(self, run_id: str, *, new: bool):
        self.run_id, self.new = run_id, new

    def metrics(self, metrics: list[mlflow.entities.Metric]) -> None:
        _client().log_batch(self.run_id, metrics=metrics)

    def picture(self, name: str, step: int, png: bytes) -> None:
        from PIL import Image

        arrived = _client().list_artifacts(self.run_id, "images")
        mine = re.compile(rf"images/{re.escape(name)}[+%]step[+%]{step}[+%]")  # as MLflow names them, and did
        if not any(mine.match(file.path) for file in arrived):
            _client().log_image(self.run_id, Image.open(io.BytesIO(png)), key=name, step=step)

    def last_step(self, metric: str) -> int:
        if self.new:
            return -1
        return max((m.step for m in _client().get_metric_history(self.run_id, metric)), default=-1)


def _unfinished(config: Command) -> list[str]:
    """The runs of earlier attempts at this command that were stopped on the way, or still go on."""
    experiment = client().get_experiment_by_name(_experiment_name())
    if experiment is None:
        return []
    query = f"tags.`{JOB_TAG}` = '{_job(config)}'"
    runs = client().search_runs([experiment.experiment_id], query, order_by=["start_time ASC"])
    return [run.info.run_id for run in runs if ENDED_TAG not in run.data.tags]


def _reopen(run_id: str) -> bool:
    """Go on with a run; False if its process has ended it meanwhile."""
    if ENDED_TAG in client().get_run(run_id).data.tags:
        return False
    client().update_run(run_id, status="RUNNING")
    for name, value in _flow_run().items():
        client().set_tag(run_id, name, value)
    return True


def _create(config: Command) -> str:
    """A new run; one whose creation was not answered is found again."""
    command, experiment, attempt = type(config).__name__.lower(), _experiment(config.root), uuid.uuid4().hex
    tags = {JOB_TAG: _job(config), ATTEMPT_TAG: attempt, **_flow_run()}

    def once() -> mlflow.entities.Run:
        found = _client().search_runs([experiment], f"tags.`{ATTEMPT_TAG}` = '{attempt}'")
        return found[0] if found else _client().create_run(experiment, tags=tags, run_name=command)

    return str(patiently(once).info.run_id)


def _describe(run_id: str, config: Command) -> None:
    """Log the configuration, again where the attempt that created the run may have died before it."""
    from mlflow.entities import Param

    params = [Param(name, str(value)) for name, value in _flat(config.model_dump(mode="json")).items()]
    client().log_batch(run_id, params=params)
    client().log_text(run_id, to_toml(config.model_dump(mode="json")), CONFIG)


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
    _terminate(run_id, status)


def _terminate(run_id: str, status: str) -> None:
    """The status, then the tag: a death between them leaves a run that the same command goes on with."""
    client().set_terminated(run_id, status)
    if status != "KILLED":
        client().set_tag(run_id, ENDED_TAG, status)


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
    place = (root.resolve() / "mlartifacts").as_uri() if local else None
    try:
        return str(client().create_experiment(name, place))
    except mlflow.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return _experiment(root)  # another run's, which came first


def _experiment_name() -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME", "vae-flows")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
