"""Housekeeping: a server set up, what a kill left closed, what has served removed, a machine looked over."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pipeline import registry_of, until

import vae
from data.images import DecodePath
from data.sources import open_source
from data.store import open_store
from data.tables import LatentColumns, encode_table, plan_encode
from data.upkeep import list_tables
from flows import promotion, registry
from flows.bootstrap import bootstrap, put, zombies
from flows.clean import clean, plan
from flows.cli import main
from flows.config import Bootstrap, Clean, Doctor, Ingest, Reconcile, Train
from flows.devices import GPU_LIMIT, gpu_slot
from flows.doctor import doctor
from flows.environment import prepare
from flows.jobs import job_store
from flows.reconcile import reconcile
from flows.tracking import Run, client
from vae.bundle import to_files
from vae.model import build

NAME = "kept"


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    with registry_of(tmp_path):
        yield tmp_path


@pytest.fixture
def prefect_client(prefect_server: str) -> Iterator[object]:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: prefect_server}), get_client(sync_client=True) as found:
        yield found


def test_bootstrap_sets_up_a_server_that_notifies_and_crashes_zombies(prefect_client, inbox) -> None:
    from prefect import flow
    from prefect.blocks.notifications import CustomWebhookNotificationBlock
    from prefect.client.schemas.objects import StateType
    from prefect.events import emit_event
    from prefect.states import Running

    from flows.events import MODEL_PROMOTED, emit, model

    url, received = inbox
    told = {"text": "{{subject}}: {{body}}"}
    CustomWebhookNotificationBlock(name="inbox", url=url, json_data=told).save("ops", overwrite=True)
    for _ in range(2):  # the second time changes nothing
        done = bootstrap(Bootstrap(gpus=1, notify="custom-webhook/ops"))
    assert prefect_client.read_global_concurrency_limit_by_name(GPU_LIMIT).limit == 1
    for name in done.automations:
        assert len(prefect_client.read_automations_by_name(name)) == 1
    with pytest.raises(ValueError, match="no block 'custom-webhook/nobody' on the server"):
        bootstrap(Bootstrap(notify="custom-webhook/nobody"))

    # A slot of the limit is held around a GPU's task, and around no other.
    with gpu_slot("cpu"):
        assert prefect_client.read_global_concurrency_limit_by_name(GPU_LIMIT).active_slots == 0
    with gpu_slot("cuda"):
        assert prefect_client.read_global_concurrency_limit_by_name(GPU_LIMIT).active_slots == 1
    assert prefect_client.read_global_concurrency_limit_by_name(GPU_LIMIT).active_slots == 0

    # A run that has had one heartbeat and no more; the shortest time that Prefect lets a trigger wait.
    put(prefect_client, zombies(10))
    run = prefect_client.create_flow_run(flow(lambda: None, name="stuck"), state=Running())
    emit_event("prefect.flow-run.heartbeat", {"prefect.resource.id": f"prefect.flow-run.{run.id}"})
    emit(MODEL_PROMOTED, model("kept"), model_uri="models:/kept/2", reason="it won")
    until(120, lambda: "vae-flows: promotion: models:/kept/2 is champion: it won" in received)
    until(120, lambda: prefect_client.read_flow_run(run.id).state.type == StateType.CRASHED)
    assert "no heartbeat" in prefect_client.read_flow_run(run.id).state.message


def test_without_a_limit_a_gpu_needs_no_slot(prefect_client) -> None:
    from contextlib import suppress

    from prefect.exceptions import ObjectNotFound

    with suppress(ObjectNotFound):
        prefect_client.delete_global_concurrency_limit_by_name(GPU_LIMIT)
    with gpu_slot("cuda"):
        pass


def test_bootstrap_needs_a_server(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: None}):
        assert main(["bootstrap", "--root", str(tmp_path / "root")]) == 2
    assert "set PREFECT_API_URL" in capsys.readouterr().err


def test_reconcile_closes_what_prefect_knows_to_be_over(root: Path, prefect_client) -> None:
    from prefect import flow
    from prefect.states import Completed, Crashed, Failed, Running

    ends = {"KILLED": Crashed(message="gone"), "FAILED": Failed(message="no"), "FINISHED": Completed()}
    runs = {}
    for status, state in [*ends.items(), ("RUNNING", Running())]:
        flow_run = prefect_client.create_flow_run(flow(lambda: None, name="ended"), state=state)
        run = Run(Ingest(root=root, source=f"folder:{status}"))
        client().set_tag(run.id, "vae_flows.flow_run", str(flow_run.id))
        runs[run.id] = status
    stranger = Run(Ingest(root=root, source="folder:elsewhere"))
    client().set_tag(stranger.id, "vae_flows.flow_run", str(uuid.uuid4()))
    found = reconcile(Reconcile(root=root))
    assert found.closed == {run: status for run, status in runs.items() if status != "RUNNING"}
    for run, status in runs.items():
        assert client().get_run(run).info.status == status
    assert client().get_run(stranger.id).info.status == "RUNNING", "another server's run may well be running"
    assert not reconcile(Reconcile(root=root)).changed
    # The same command goes on with what crashed, and begins anew what failed.
    for status, same in (("KILLED", True), ("FAILED", False)):
        again = Run(Ingest(root=root, source=f"folder:{status}"))
        again.resume()
        assert again.resumed is same


def test_reconcile_finishes_a_promotion(root: Path, prefect_client) -> None:
    first, second = register(root, 1), register(root, 2)
    promotion.move(root, NAME, first, "won", after=0)
    promotion.move(root, NAME, second, "won too", after=1)
    registry.set_champion(NAME, first)  # as if it had been killed between the record and the alias
    assert reconcile(Reconcile(root=root)).models == {NAME: 0}
    assert registry.champion(NAME) == second
    assert promotion.settled(root, NAME, promotion.history(root, NAME)[-1])


def register(root: Path, seed: int) -> str:
    """A version with everything that a training leaves: its job, checkpoints forgotten in it, its table."""
    model = build(vae.FlatConfig(height=8, width=8, channels=1, latent_dim=2), seed)
    store = job_store(root, f"train-{seed}")
    for name, content in to_files(model, {"decode": {}}).items():
        store.put_if_absent(f"bundle/{name}", content)
    store.put_if_absent("checkpoints/1.safetensors", b"left")
    store.put_if_absent("trained.json", b"{}")
    run = Run(Train(root=root))
    bundle = root / "jobs" / f"train-{seed}" / "bundle"
    found = registry.register(run, root, NAME, f"train-{seed}", bundle, {"dataset_digest": "d"})
    run.finish()
    job = plan_encode(
        open_store(root / "latents"),
        open_source("digits"),
        DecodePath(8, 8, 1),
        LatentColumns(dims=2),
        name=NAME,
        weights_sha256=str(seed),
        lineage={"model": f"models:/{NAME}/{found.version}"},
    )
    zeros = {"mu": np.zeros, "logvar": np.zeros, "kl": np.zeros}
    shapes = {"mu": (2,), "logvar": (2,), "kl": ()}
    encode_table(
        job,
        lambda images, ids: {n: f((len(ids), *shapes[n]), np.float32) for n, f in zeros.items()},
        max_reject_share=0,
    )
    return str(found.version)


def test_clean_keeps_what_can_be_rolled_back_to(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    versions = [register(root, seed) for seed in range(1, 6)]
    assert versions == ["1", "2", "3", "4", "5"]
    promotion.move(root, NAME, "1", "first", after=0)
    promotion.move(root, NAME, "2", "better", after=1)
    removed = plan(Clean(root=root, keep=1))
    # 2 is champion; with one champion to keep 1 goes; 5 is the newest, and the challenger.
    assert removed.versions == [f"models:/{NAME}/{v}" for v in ("1", "3", "4")]
    assert removed.jobs == ["train-1", "train-3", "train-4"]
    assert len(removed.tables) == 3
    assert len(removed.checkpoints) == 5
    assert plan(Clean(root=root, keep=2)).versions == [f"models:/{NAME}/3"], "1 can be rolled back to"
    assert len(list((root / "latents").iterdir())) == 5, "a plan removes nothing"

    done = clean(Clean(root=root, keep=1))
    assert done.versions == removed.versions
    assert {str(v.version) for v in client().search_model_versions(f"name = '{NAME}'")} == {"2", "5"}
    assert registry.locate(f"models:/{NAME}@champion").files()
    assert sorted(path.name for path in (root / "jobs").iterdir() if any(path.rglob("*.json"))) == [
        "train-2",
        "train-5",
    ]
    left = list_tables(str(root / "latents"))
    assert {table.about["lineage"]["model"] for table in left} == {f"models:/{NAME}/{v}" for v in ("2", "5")}
    files = [path for path in (root / "latents").rglob("*") if path.is_file()]
    assert len({path.relative_to(root / "latents").parts[0] for path in files}) == 2, "no file of the others"
    assert not clean(Clean(root=root, keep=1)).changed


def test_doctor_says_what_to_do_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:hunter2@127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "hunter2")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    servers = {PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_API_AUTH_STRING: "admin:hunter2"}
    with temporary_settings(servers):
        found = doctor(Doctor(root=tmp_path))
    assert found.exit_code == 1
    failed = {finding.name: finding for finding in found.findings if not finding.fit}
    assert "no answer" in failed["prefect"].found
    assert "prefect server start" in failed["prefect"].remedy
    assert "mlflow server" in failed["mlflow"].remedy
    assert failed["credentials"].remedy == "set AWS_SECRET_ACCESS_KEY"
    assert "hunter2" not in found.summary() + found.model_dump_json()
    assert all(finding.remedy for finding in failed.values())


def test_doctor_finds_this_machine_fit(tmp_path: Path, monkeypatch, prefect_server: str) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    prepare(tmp_path)
    with temporary_settings({PREFECT_API_URL: prefect_server}):
        found = doctor(Doctor(root=tmp_path))
    assert found.exit_code == 0, found.summary()
    names = [finding.name for finding in found.findings]
    assert names == ["python", "versions", "torchvision", "device", "root", "prefect", "mlflow"]
