"""Schedules: one definition, taken by Prefect's own loader, and run by `serve` on the clock and on events."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args
from uuid import uuid4

import pytest
from pipeline import SHORT, command, environment, prefect_server_with_scheduler, run, run_json, until
from prefect.client.schemas.objects import FlowRun
from sockets import beyond_loopback

from flows.bootstrap import bootstrap
from flows.config import Bootstrap, Retrain, Serve
from flows.deployments import deployments, prefect_yaml
from flows.devices import GPU_LIMIT, LEASE_SECONDS, gpu_slot
from flows.presets import PRESETS
from vae.config import LikelihoodName

HOME = Path(__file__).parent.parent
WORKERS = {
    "process": "prefect.workers.process:ProcessJobConfiguration",
    "docker": "prefect_docker.worker:DockerWorkerJobConfiguration",
    "kubernetes": "prefect_kubernetes.worker:KubernetesWorkerJobConfiguration",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server with its scheduler; its URL."""
    with prefect_server_with_scheduler(tmp_path_factory.mktemp("prefect")) as url:
        yield url


HOLD = """
import time
from flows.devices import gpu_slot
with gpu_slot("cuda"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module", autouse=True)
def killed_holder(server: str) -> None:
    """The one slot of the limit on GPUs, held by a process that was killed; its lease runs out meanwhile."""
    bootstrap(Bootstrap(gpus=1))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdout=subprocess.PIPE, env=environment(), cwd=HOME
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    holder.kill()
    holder.wait()
    assert slots(server) == 1


def slots(server: str) -> int:
    """Those of the limit on GPUs that are in use."""
    return int(ask(server, f"v2/concurrency_limits/{GPU_LIMIT}", method="GET")["active_slots"])


def prefect(*arguments: object) -> str:
    """Prefect's own command line."""
    line = [sys.executable, "-m", "prefect", "--no-prompt", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=HOME, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ask(server: str, question: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
    """Prefect's API; a method that it answers with an error raises."""
    import httpx

    answer = httpx.request(method, f"{server}/{question}", json=body, trust_env=False, timeout=60)
    answer.raise_for_status()
    return answer.json() if answer.content else None


def test_the_file_holds_the_definition() -> None:
    written = (HOME / "prefect.yaml").read_text()
    assert written == prefect_yaml(Serve()), "write it anew: vae-flows serve --write prefect.yaml"


@pytest.fixture(scope="module")
def deployed(server: str) -> dict[str, Any]:
    """Every deployment of prefect.yaml, by its flow."""
    for kind in WORKERS:
        name = "vae-flows" if kind == "process" else f"vae-{kind}"
        template = HOME / "deploy" / f"{kind}-pool.json"
        prefect("work-pool", "create", name, "--type", kind, "--base-job-template", template)
    prefect("deploy", "--all")
    found = ask(server, "deployments/filter", {})
    assert {one["name"] for one in found} == {"vae-digits"}
    assert len(found) == 3
    return {one["entrypoint"].split(".")[1]: one for one in found}


def test_prefect_takes_the_pools(server: str, deployed: dict[str, Any]) -> None:
    for kind in ("docker", "kubernetes"):
        pool = ask(server, f"work_pools/vae-{kind}", method="GET")
        assert pool["type"] == kind
        variables = pool["base_job_template"]["variables"]["properties"]
        assert variables["image"]["default"] == "vae-flows"
        text = json.dumps(pool["base_job_template"]["job_configuration"])
        for name in variables:
            assert f"{{{{ {name} }}}}" in text, f"variable {name!r} of {kind} is used nowhere"


@pytest.mark.parametrize(("kind", "module"), WORKERS.items())
def test_a_worker_takes_its_pool(server: str, kind: str, module: str) -> None:
    """By the models that Prefect's own workers make their jobs of."""
    worker = pytest.importorskip(module.split(":")[0], reason=f"prefect-{kind} is not installed")
    configuration = getattr(worker, module.split(":")[1])
    template = json.loads((HOME / "deploy" / f"{kind}-pool.json").read_text())
    assert set(template["job_configuration"]) <= set(configuration.model_fields)
    made = asyncio.run(configuration.from_template_and_values(template, {}))
    made.prepare_for_flow_run(FlowRun(flow_id=uuid4()))
    job = json.dumps(made.model_dump(), default=str)
    assert "{{" not in job, "every variable of the template has a value, or what it stands in is left out"
    if kind == "process":
        assert made.command == f"{sys.executable} -m prefect.engine"
    else:
        assert "prefect flow-run execute" in job
        assert '"image": "vae-flows"' in job
        assert "/var/lib/vae-flows" in job


def test_prefect_takes_the_deployments(deployed: dict[str, Any]) -> None:
    for one in deployments(Serve()):
        found = deployed[one.flow]
        assert [entry["schedule"]["cron"] for entry in found["schedules"]] == [one.cron]
        assert found["global_concurrency_limit"]["limit"] == 1
        assert found["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
        assert found["work_pool_name"] == "vae-flows"
        # What a worker makes of it is the configuration that was meant.
        assert type(one.config)(**found["parameters"]["config"]) == one.config


def test_events_start_deployments(server: str, deployed: dict[str, Any]) -> None:
    found = {
        (automation["trigger"]["expect"][0], automation["actions"][0]["deployment_id"])
        for automation in ask(server, "automations/filter", {})
        if "deployment_id" in automation["actions"][0]
    }
    retrain, encode = deployed["retrain"]["id"], deployed["encode"]["id"]
    updated, drifted = "vae.dataset.updated", "vae.drift.detected"
    assert found == {(updated, retrain), (updated, encode), (drifted, retrain)}


def test_the_form_is_typed(server: str, deployed: dict[str, Any]) -> None:
    schema = deployed["retrain"]["parameter_openapi_schema"]
    records = schema["definitions"]
    retrain = records["Retrain"]["properties"]
    assert retrain["duplicates"]["enum"] == ["keep", "drop", "fail"]
    assert (retrain["count"]["type"], retrain["count"]["minimum"]) == ("integer", 1)
    assert set(retrain["model"]["discriminator"]["mapping"]) == {"flat", "autoencoder", "ladder"}
    training, flat = records["TrainConfig"]["properties"], records["FlatConfig"]["properties"]
    assert training["learning_rate"]["type"] == "number"
    assert training["objective"]["enum"] == ["elbo", "iwae"]
    assert set(flat["likelihood"]["enum"]) == set(get_args(LikelihoodName))
    assert records["DecodePath"]["properties"]["fit"]["enum"] == ["crop", "pad", "stretch"]
    assert set(PRESETS) < set(retrain["preset"]["enum"])
    assert "required" not in records["Retrain"], "a form or a program may leave everything out"
    # The server itself holds a run to the schema.
    create = f"deployments/{deployed['retrain']['id']}/create_flow_run"
    later = {"type": "SCHEDULED", "state_details": {"scheduled_time": "2100-01-01T00:00:00Z"}}
    with pytest.raises(Exception, match=r"409|422"):
        ask(server, create, {"parameters": {"config": {"count": "many"}}, "state": later})
    with pytest.raises(Exception, match=r"409|422"):
        ask(server, create, {"parameters": {"config": {"sauce": "digits"}}, "state": later})
    ask(server, create, {"parameters": {"config": {"source": "digits"}}, "state": later})


@pytest.fixture(scope="module")
def served(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`vae-flows serve` of short retrainings, on a server of its own deployments; its root."""
    root = tmp_path_factory.mktemp("served")
    settings = (
        "--retrain-cron",
        "",
        "--encode-cron",
        "",
        "--model-name",
        "served",
        "--runner",
        "processes:2",
    )
    with open(root / "serve.log", "wb") as log:
        process = subprocess.Popen(
            command("serve", *SHORT, *settings, "--runner", "processes:2", root=root),
            stdout=log,
            stderr=log,
            env=environment() | {"PREFECT_RUNNER_POLL_FREQUENCY": "1"},
        )
        yield root
        assert beyond_loopback(process.pid) == set()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143, (root / "serve.log").read_text()


def runs(server: str, flow: str) -> list[dict[str, Any]]:
    """A served flow's runs that were started from its deployment, oldest first."""
    query = {"flows": {"name": {"any_": [flow]}}, "deployments": {"name": {"any_": ["served"]}}}
    return ask(server, "flow_runs/filter", {**query, "sort": "EXPECTED_START_TIME_ASC"})


def logs(server: str) -> list[str]:
    """What all flow runs have logged, a flow's own and those it called, as far as the server has it."""
    return [line["message"] for line in ask(server, "logs/filter", {"logs": {}, "sort": "TIMESTAMP_DESC"})]


def test_an_event_starts_what_is_served_and_an_overlap_is_cancelled(server: str, served: Path) -> None:
    named = {"deployments": {"name": {"any_": ["served"]}}, "flows": {"name": {"any_": ["retrain"]}}}
    (retrain,) = until(180, lambda: ask(server, "deployments/filter", named))
    # Another source is none of its business, whoever tells of it.
    other = json.dumps({"prefect.resource.id": "vae.dataset.other", "vae.by": "upload"})
    prefect("event", "emit", "vae.dataset.updated", "--resource", other)
    # A new snapshot, made by a command of its own, is the event.
    assert os.environ["PREFECT_API_URL"] == server
    ingested = run_json("ingest", "--limit", 300, root=served / "elsewhere")
    assert ingested["changed"]
    first = until(300, lambda: runs(server, "retrain"))[0]
    until(300, lambda: runs(server, "retrain")[0]["state"]["type"] == "RUNNING")
    ask(server, f"deployments/{retrain['id']}/create_flow_run", {})
    second = until(60, lambda: [r for r in runs(server, "retrain") if r["state_type"] == "CANCELLED"])[0]
    assert second["state"]["message"] == "Deployment concurrency limit reached."
    over = ("COMPLETED", "FAILED", "CRASHED")
    until(900, lambda: runs(server, "retrain")[0]["state_type"] in over)
    first = next(r for r in runs(server, "retrain") if r["id"] == first["id"])
    assert first["state_type"] == "COMPLETED", first["state"]["message"]
    assert first["id"] != second["id"]
    # It has updated the dataset itself, which is no reason for another run.
    assert len(runs(server, "retrain")) == 2
    # A run's last log lines reach the server after its state.
    for told in ("served version 1 is champion", "images in 1 shards, processes:2"):
        until(60, lambda told=told: [line for line in logs(server) if told in line])
    pulled = run("pull", "models:/served@champion", served / "bundle", root=served)
    assert "models:/served/1 is in" in pulled.stdout


def test_a_form_may_leave_everything_out() -> None:
    assert Retrain() == Retrain(source="digits", preset="digits")


def test_the_slot_of_a_gpu_comes_free_after_a_kill(server: str) -> None:
    until(LEASE_SECONDS + 60, lambda: slots(server) == 0)
    with gpu_slot("cuda"):
        assert slots(server) == 1
    assert slots(server) == 0
