"""The servers of deploy/compose.yaml, for real: PostgreSQL, Prefect, MLflow on S3, a worker with a run."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from string import Template
from typing import Any

import httpx
import pytest
import yaml
from parts import need
from pipeline import SHORT, until

import vae
from flows.config import Serve
from flows.deployments import prefect_yaml

HOME = Path(__file__).parent.parent
DEPLOY = HOME / "deploy"
MODEL = "vae-digits"
SECRETS = {
    "POSTGRES_PASSWORD": "of-postgres",
    "PREFECT_AUTH": "admin:of-prefect",
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "of-s3",
    "AWS_DEFAULT_REGION": "us-east-1",
    "MLFLOW_BUCKET": "mlflow-artifacts",
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, timeout=10).is_success
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def stack() -> Iterator[ExitStack]:
    """What is started is ended in reverse order."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def postgres(stack: ExitStack) -> int:
    """Debian's PostgreSQL with the databases of deploy/postgres.sql; its port."""
    binaries = max(Path("/usr/lib/postgresql").glob("*/bin/initdb"), default=Path()).parent
    need(binaries.name, "Debian's package postgresql")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vae-flows-postgres-")))
    user: dict[str, Any] = {}
    if os.geteuid() == 0:  # which PostgreSQL refuses to run as
        shutil.chown(folder, "postgres", "postgres")
        user = {"user": "postgres", "group": "postgres", "extra_groups": []}
    password = folder / "password"
    password.write_text(SECRETS["POSTGRES_PASSWORD"])
    password.chmod(0o644)
    made = [binaries / "initdb", "-D", folder / "data", "-U", "postgres", "-A", "scram-sha-256"]
    subprocess.run([*made, f"--pwfile={password}"], check=True, capture_output=True, cwd=folder, **user)
    port = free_port()
    options = ["-p", str(port), "-k", str(folder), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
    start(stack, folder / "log", [binaries / "postgres", "-D", folder / "data", *options], cwd=folder, **user)
    login = os.environ | {"PGPASSWORD": SECRETS["POSTGRES_PASSWORD"]}
    server = ["-h", "127.0.0.1", "-p", str(port), "-U", "postgres"]
    until(60, lambda: subprocess.run([binaries / "pg_isready", *server], capture_output=True).returncode == 0)
    script = ["-v", "ON_ERROR_STOP=1", "-f", DEPLOY / "postgres.sql"]
    subprocess.run([binaries / "psql", *server, *script], check=True, capture_output=True, env=login)
    return port


def start(stack: ExitStack, log: Path, line: list[Any], **how: Any) -> subprocess.Popen[bytes]:
    """Start a process that ends with the test; what it says goes to a log."""
    with open(log, "wb") as file:
        process = subprocess.Popen([*map(str, line)], stdout=file, stderr=subprocess.STDOUT, **how)

    def end() -> None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    stack.callback(end)
    return process


@dataclass
class Servers:
    """deploy/compose.yaml on loopback: where each host:port of it is here, and its services' logs."""

    stack: ExitStack
    folder: Path
    places: dict[str, str]
    services: dict[str, Any]

    def here(self, text: str) -> str:
        for place, here in self.places.items():
            text = text.replace(place, here)
        return text

    def environment(self, name: str) -> dict[str, str]:
        """A service's environment, over that of this machine without anything of Prefect's and MLflow's."""
        own = {key: self.here(value) for key, value in self.services[name]["environment"].items()}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "AWS_"))}
        own["PREFECT_HOME"] = str(self.folder / f"{name}-home")
        return kept | own | {"PREFECT_UI_ENABLED": "false", "PYTHONPATH": str(HOME)}

    def start(self, name: str, **more: str) -> subprocess.Popen[bytes]:
        command = [self.here(part) for part in self.services[name]["command"]]
        line = [sys.executable, "-m", *command]
        environment = self.environment(name) | more
        return start(self.stack, self.folder / f"{name}.log", line, env=environment, cwd=self.folder)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()


@pytest.fixture(scope="module")
def servers(stack: ExitStack, postgres: int, tmp_path_factory: pytest.TempPathFactory) -> Servers:
    """Prefect's and MLflow's servers, by the commands and environments of the compose file."""
    moto = pytest.importorskip("moto.server", reason="moto's server is not installed")
    s3 = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3.start()
    stack.callback(s3.stop)
    endpoint = "http://{}:{}".format(*s3.get_host_and_port())
    bucket = urllib.request.Request(f"{endpoint}/{SECRETS['MLFLOW_BUCKET']}", method="PUT")
    urllib.request.urlopen(bucket).read()
    prefect, mlflow = free_port(), free_port()
    places = {
        "postgres:5432": f"127.0.0.1:{postgres}",
        "prefect:4200": f"127.0.0.1:{prefect}",
        "mlflow:5000": f"127.0.0.1:{mlflow}",
        "0.0.0.0": "127.0.0.1",
        "4200": str(prefect),
        "port=5000": f"port={mlflow}",
    }
    text = Template((DEPLOY / "compose.yaml").read_text()).substitute(SECRETS | {"S3_ENDPOINT": endpoint})
    folder = tmp_path_factory.mktemp("servers")
    running = Servers(stack, folder, places, yaml.safe_load(text)["services"])
    running.start("prefect")
    running.start("mlflow")
    until(600, lambda: answers(f"http://127.0.0.1:{mlflow}/health") or _dead(running, "mlflow"))
    until(600, lambda: answers(f"http://127.0.0.1:{prefect}/api/health") or _dead(running, "prefect"))
    return running


def _dead(servers: Servers, name: str) -> None:
    log = servers.log(name)
    assert "Traceback" not in log, log


def prefect(servers: Servers, *arguments: object) -> None:
    """Prefect's command line, as the worker's user runs it."""
    line = [sys.executable, "-m", "prefect", "--no-prompt", *map(str, arguments)]
    environment = servers.environment("worker")
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=servers.folder)
    assert done.returncode == 0, done.stdout + done.stderr


def ask(servers: Servers, question: str, body: dict[str, Any]) -> Any:
    environment = servers.environment("worker")
    user, password = environment["PREFECT_API_AUTH_STRING"].split(":")
    url = f"{environment['PREFECT_API_URL']}/{question}"
    answer = httpx.post(url, json=body, auth=(user, password), trust_env=False, timeout=60)
    answer.raise_for_status()
    return answer.json()


@pytest.fixture(scope="module")
def scheduled(servers: Servers) -> dict[str, Any]:
    """The run of a deployment that was scheduled a few seconds ahead, over."""
    short = dict(zip((o.removeprefix("--").replace("-", "_") for o in SHORT[::2]), SHORT[1::2], strict=True))
    training = {name: short.pop(name) for name in ("epochs", "checkpoint_every")}
    definition = prefect_yaml(
        Serve(**short, training=training, retrain_cron="", encode_cron="", report_cron="")
    )
    (servers.folder / "prefect.yaml").write_text(definition)
    template = DEPLOY / "process-pool.json"
    prefect(servers, "work-pool", "create", "vae-flows", "--type", "process", "--base-job-template", template)
    prefect(servers, "deploy", "--all")
    prefect(servers, "deployment", "run", f"retrain/{MODEL}", "--start-in", "5 seconds")
    root = str(servers.folder / "root")
    servers.start("worker", VAE_FLOWS_ROOT=root, PREFECT_WORKER_QUERY_SECONDS="1")
    query = {"deployments": {"name": {"any_": [MODEL]}}}
    over = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
    return until(
        900, lambda: [r for r in ask(servers, "flow_runs/filter", query) if r["state_type"] in over]
    )[0]


def test_a_worker_completes_what_was_scheduled(servers: Servers, scheduled: dict[str, Any]) -> None:
    assert scheduled["state_type"] == "COMPLETED", servers.log("worker")
    started, due = (datetime.fromisoformat(scheduled[f"{name}start_time"]) for name in ("", "expected_"))
    assert started > due - timedelta(seconds=1)  # Prefect's server waits for whole seconds
    assert not list(servers.folder.rglob("mlflow.db"))


def test_its_model_is_in_the_registry_with_artifacts_in_s3(
    servers: Servers, scheduled: dict[str, Any], tmp_path: Path
) -> None:
    import mlflow

    uri = servers.environment("worker")["MLFLOW_TRACKING_URI"]
    client = mlflow.MlflowClient(uri, uri)
    version = client.get_model_version_by_alias(MODEL, "champion")
    assert client.get_run(version.run_id).info.status == "FINISHED"
    found = servers.services["mlflow"]["environment"]
    listing = httpx.get(f"{found['MLFLOW_S3_ENDPOINT_URL']}/{SECRETS['MLFLOW_BUCKET']}", trust_env=False).text
    assert "artifacts/bundle/model.safetensors</Key>" in listing
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)  # over what another test has set: the variable alone would not be
    try:
        place = f"models:/{MODEL}@champion/artifacts/bundle"
        bundle = mlflow.artifacts.download_artifacts(place, dst_path=str(tmp_path))
    finally:
        mlflow.set_tracking_uri(before)
    assert vae.load(bundle).latent_dim == 16


def test_the_servers_let_nobody_in_who_is_not_named(servers: Servers) -> None:
    environment = servers.environment("worker")
    assert httpx.post(f"{environment['PREFECT_API_URL']}/flows/filter", trust_env=False).status_code == 401
    url = f"{environment['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/experiments/get?experiment_id=0"
    assert httpx.get(url, trust_env=False).status_code == 200
    assert httpx.get(url, trust_env=False, headers={"Host": "evil.example"}).status_code == 403


def test_the_compose_file_is_what_compose_takes() -> None:
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed")
    line = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*line, DEPLOY / "compose.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_is_published_is_published_on_loopback() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    ports = {port for service in services.values() for port in service.get("ports", [])}
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    hosts = [
        unit.read_text().split("--host ")[1].split()[0]
        for unit in DEPLOY.glob("systemd/*.service")
        if "--host " in unit.read_text()
    ]
    assert hosts == ["127.0.0.1"] * 2


def test_every_setting_of_the_compose_file_is_in_the_example() -> None:
    named = {line.split("=")[0] for line in (DEPLOY / "example.env").read_text().splitlines() if "=" in line}
    wanted = {
        match["braced"] or match["named"]
        for match in Template.pattern.finditer((DEPLOY / "compose.yaml").read_text())
        if match["braced"] or match["named"]
    }
    assert named == wanted


def test_units_are_what_systemd_takes(tmp_path: Path) -> None:
    need(shutil.which("systemd-analyze"), "systemd-analyze")
    units = []
    for unit in (DEPLOY / "systemd").glob("*.service"):
        text = unit.read_text()
        assert "/opt/vae-flows/.venv/bin/" in text
        # Their programs are not installed where the test runs: any other does.
        units.append(tmp_path / unit.name)
        units[-1].write_text(text.replace(text.split("ExecStart=")[1].split()[0], "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert len(units) == 4


def test_pools_are_json() -> None:
    for pool in DEPLOY.glob("*-pool.json"):
        assert set(json.loads(pool.read_text())) == {"job_configuration", "variables"}
