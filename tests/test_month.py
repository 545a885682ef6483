"""A month of production in minutes: schedule's days one after the other, everything asserted after each.

A `vae-flows serve` runs beside it, and the retrain of day 4 is started by the event of drift, as in life.
The other days' flows run in this process, on the same Prefect server and MLflow store.
"""

from __future__ import annotations

import gzip
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from parts import need
from PIL import Image
from pipeline import command, environment, prefect_server_with_scheduler, registry_of, until
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import FlowRunSort
from sklearn.datasets import load_digits

from data.tables import read_latents
from flows import cli, promotion, registry
from flows.bootstrap import bootstrap
from flows.commands import to_toml
from flows.config import Bootstrap, Drift, Encode, Follow, Lineage, Promote, Retrain, Rollback, Serve
from flows.drift import drift
from flows.encode import encode
from flows.follow import follow
from flows.lineage import lineage
from flows.promote import promote
from flows.results import Drifted, Retrained, Table
from flows.retrain import retrain
from flows.rollback import rollback

NAME = "vae-month"
FASHION = Path("/usr/share/datasets/fashion-mnist")


def digits() -> np.ndarray:
    """Shuffled, for they come ordered by who wrote them, which is a drift of its own."""
    return np.random.default_rng(0).permutation(np.rint(load_digits().images * 255 / 16).astype(np.uint8))


def fashion() -> np.ndarray:
    """The 70,000 of Debian's package."""
    need(FASHION.is_dir(), "Debian's package dataset-fashion-mnist")
    parts = [
        gzip.decompress((FASHION / f"{part}-images-idx3-ubyte.gz").read_bytes()) for part in ("train", "t10k")
    ]
    return np.concatenate([np.frombuffer(part, np.uint8, offset=16).reshape(-1, 28, 28) for part in parts])


@dataclass(frozen=True)
class Scale:
    """A month's images, how many there are on days 1, 3 and 4, and what trains on them."""

    images: Callable[[], np.ndarray]
    days: tuple[int, int, int]
    settings: dict[str, Any]


DIGITS = Scale(digits, (600, 700, 1400), {"preset": "digits", "training": {"epochs": 30, "batch_size": 32}})
FASHION_MNIST = Scale(fashion, (30_000, 35_000, 70_000), {"preset": "textbook", "training": {"epochs": 2}})
BAD = {"epochs": 1, "learning_rate": 1e-5}


class Month:
    """The folder that images arrive in, and what a scheduler runs on it."""

    def __init__(self, folder: Path, scale: Scale, inbox: list[str]):
        self.inbox = inbox
        self.root, self.folder = folder / "state", folder / "images"
        self.images, self.days = scale.images(), scale.days
        height, width = self.images.shape[1:]
        self.settings = {
            "root": self.root,
            "source": f"folder:{self.folder}",
            "model_name": NAME,
            "decode": {"height": height, "width": width, "channels": 1},
            "importance_samples": 5,
            "count": 4,
            **scale.settings,
        }
        self.root.mkdir()
        self.folder.mkdir()

    def arrive(self, start: int, stop: int, turned: float = 0.0) -> None:
        for index in range(start, stop):
            image = Image.fromarray(self.images[index]).rotate(turned)
            image.save(self.folder / f"{index:05d}.png", compress_level=1)

    def retrain(self, **changes: Any) -> Retrained:
        return retrain(Retrain(**self.settings | changes))

    def encode(self) -> Table:
        """The incremental encode, into tables of its own beside those of the retrain."""
        champion = f"models:/{NAME}@champion"
        return encode(Encode(root=self.root, model=champion, source=self.settings["source"], follow=True))

    def drift(self) -> Drifted:
        """The arrived images against those of the champion's own snapshot."""
        return drift(Drift(root=self.root, model=f"models:/{NAME}@champion", source=self.settings["source"]))

    def start(self, flow: str, **changes: Any) -> None:
        """A run of a deployment by hand, its settings changed in Prefect's form."""
        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name(f"{flow}/{NAME}")
            config = {**deployment.parameters["config"], **changes}
            client.create_flow_run_from_deployment(deployment.id, parameters={"config": config})

    def served(self) -> list[str]:
        """The states of the runs that a deployment has started, by Prefect's own client."""
        with get_client(sync_client=True) as client:
            runs = client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_ASC)
        return [run.state_name or "" for run in runs if run.deployment_id]

    def told(self) -> list[str]:
        """What the operators were told; a server whose SQLite was locked meanwhile may tell it twice."""
        return list(dict.fromkeys(self.inbox))

    def champion(self) -> str:
        """By MLflow's own client."""
        return str(mlflow.MlflowClient().get_model_version_by_alias(NAME, "champion").version)

    def moves(self) -> list[tuple[str, str]]:
        return [(move.version, move.kind) for move in promotion.history(self.root, NAME)]

    def made_of(self, thing: str) -> tuple[set[str], set[str]]:
        """The models and the tables of the lineage of a thing."""
        found = lineage(Lineage(root=self.root, thing=thing))
        return {model.uri for model in found.models}, {table.uri for table in found.tables}

    def tables_of(self, version: str) -> dict[str, int]:
        """The latent tables that a version has made, and their rows."""
        found = lineage(Lineage(root=self.root, thing=f"models:/{NAME}/{version}"))
        return {table.uri: table.rows for table in found.tables if table.kind == "latents"}


@pytest.fixture
def month(tmp_path: Path, request: pytest.FixtureRequest, inbox: tuple[str, list[str]]) -> Iterator[Month]:
    """The month's folders, a Prefect server that notifies, and `vae-flows serve` on them."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock

    made = Month(tmp_path, request.param, inbox[1])
    with registry_of(made.root), prefect_server_with_scheduler(tmp_path):
        text = {"text": "{{subject}}: {{body}}"}
        CustomWebhookNotificationBlock(name="inbox", url=inbox[0], json_data=text).save("ops")
        bootstrap(Bootstrap(notify="custom-webhook/ops"))
        made.arrive(0, made.days[0])
        server = serve(made, tmp_path)
        yield made
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 143, (tmp_path / "serve.log").read_text()


def serve(month: Month, folder: Path) -> subprocess.Popen[bytes]:
    """The deployments, started by events alone."""
    config = Serve(**month.settings, retrain_cron="", encode_cron="", report_cron="")
    (folder / "serve.toml").write_text(to_toml(config.model_dump(mode="json")))
    line = command("serve", "--config", folder / "serve.toml", root=month.root)
    with open(folder / "serve.log", "wb") as log:
        quick = environment() | {"PREFECT_RUNNER_POLL_FREQUENCY": "1"}
        process = subprocess.Popen(line, stdout=log, stderr=log, env=quick)
    with get_client(sync_client=True) as client:
        until(180, lambda: len(client.read_deployments()) == 3)
    return process


def flow_runs(name: str) -> list[str]:
    """The states of a flow's runs, by Prefect's own client."""
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName

    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=[name])))
    return [run.state_name or "" for run in runs]


def events_of(resource: str) -> set[str]:
    """The events of a resource that Prefect's server keeps."""
    from prefect.events.filters import EventFilter, EventResourceFilter

    wanted = EventFilter(resource=EventResourceFilter(id=[resource]))
    found: set[str] = set()
    for _ in range(30):  # they are sent and kept by threads of their own
        with get_client(sync_client=True) as client:
            found = {event.event for event in client.read_events(wanted, limit=50).events}
        if len(found) == 2:
            break
        time.sleep(1)
    return found


@pytest.mark.parametrize(
    "month",
    [pytest.param(DIGITS, id="digits"), pytest.param(FASHION_MNIST, id="fashion", marks=pytest.mark.slow)],
    indirect=True,
)
def test_a_month(month: Month) -> None:
    half, more_images, all_images = month.days

    # Day 1: the first half trains, the first sound version is champion, its latents are there.
    first = month.retrain()
    assert first.verdict.promoted, first.verdict.reason
    assert (month.champion(), month.moves()) == ("1", [("1", "promote")])
    assert first.latents is not None
    assert first.latents.rows == half
    table = month.encode()
    assert (table.rows, table.changed) == (half, True)
    dataset = first.ingested.fingerprint
    assert month.made_of(dataset)[0] == {f"models:/{NAME}/1"}
    assert month.made_of(table.uri)[1] >= {table.uri, first.latents.uri, first.ingested.snapshot}
    assert flow_runs("retrain") == ["Completed"]
    told = f"vae-flows: promotion: models:/{NAME}/1 is champion: the first sound version"
    until(60, lambda: month.told() == [told])

    # Day 2: nothing new, nothing done.
    runs = len(mlflow.MlflowClient().search_runs(["1"]))
    assert not month.retrain().changed
    assert not month.encode().changed
    assert len(mlflow.MlflowClient().search_runs(["1"])) == runs
    assert month.tables_of("1") == {first.latents.uri: half, table.uri: half}

    # Day 3: new images; the incremental encode appends them to the same table.
    month.arrive(half, more_images)
    before = dict(zip(*read_latents(table.uri), strict=True))
    more = month.encode()
    assert (more.uri, more.rows, more.changed) == (table.uri, more_images, True)
    ids, latents = read_latents(more.uri)
    assert before.keys() < set(ids)
    for id, row in zip(ids, latents, strict=True):
        np.testing.assert_array_equal(row, before.get(id, row))

    # They are like those the model knows.
    assert not month.drift().drift
    assert month.served() == [], "no event so far was a reason to start anything"

    # Day 4: turned images raise the alarm, an event that starts the served retrain; on all images it makes a
    # version that is surely better on them.
    month.arrive(more_images, all_images, turned=90)
    drifted = month.drift()
    assert drifted.drift, drifted.reason
    assert events_of(f"vae.model.{NAME}") >= {"vae.model.promoted", "vae.drift.detected"}
    over = ["Completed"], ["Failed"], ["Crashed"]
    until(3600, lambda: month.served() in over)
    assert month.served() == ["Completed"]
    second = month.retrain()
    assert not second.changed, "the event's run has done it all"
    assert second.verdict.promoted, second.verdict.reason
    assert second.verdict.difference is not None
    assert second.verdict.difference.low > 0
    assert (month.champion(), month.moves()[-1]) == ("2", ("2", "promote"))
    assert second.latents is not None
    followed = month.tables_of("2")
    assert set(followed.values()) == {all_images}
    assert len(followed) == 2, "the retrain's own table and the successor of the incremental one"
    assert second.latents.uri in followed
    models, tables = month.made_of(second.ingested.fingerprint)
    assert models == {f"models:/{NAME}/2"}
    assert set(followed) < tables
    assert table.uri not in followed, "another model's latents are another table"
    until(60, lambda: len(month.told()) == 3)
    assert set(month.told()[1:]) == {
        f"vae-flows: drift: {drifted.new} drifts from models:/{NAME}/1: {drifted.reason}",
        f"vae-flows: promotion: models:/{NAME}/2 is champion: {second.verdict.reason}",
    }

    # Day 5: a bad configuration is refused, a worse model is not promoted, and nothing else changes.
    source = str(month.settings["source"])
    assert cli.main(["retrain", "--source", source, "--epoch", "3", "--root", str(month.root)]) == 2
    worse = month.retrain(training=BAD)
    assert not worse.verdict.promoted
    assert "not surely better than version 2's" in worse.verdict.reason or "collapsed" in worse.verdict.reason
    assert worse.latents is not None
    assert worse.latents.model == f"models:/{NAME}/2"
    assert (month.champion(), month.moves()[-1]) == ("2", ("2", "promote"))
    challenger = mlflow.MlflowClient().get_model_version_by_alias(NAME, "challenger")
    assert str(challenger.version) == worse.version == "3"
    assert (month.tables_of("2"), month.tables_of("3")) == (followed, {})

    # Somebody starts one by Prefect's form, on a folder that is not there: it fails, and that is told.
    month.start("encode", source="folder:/no/such/folder")
    until(120, lambda: month.served() == ["Completed", "Failed"])
    until(60, lambda: len(month.told()) == 4)
    assert month.told()[3].startswith("vae-flows: failure: encode ")
    assert "no folder /no/such/folder" in month.told()[3]

    # Day 6: back to the version before, its tables included; once more is refused; by hand forward again.
    back = rollback(Rollback(root=month.root, name=NAME))
    assert (month.champion(), month.moves()[-1]) == ("1", ("1", "rollback"))
    assert {table.model for table in back.tables} == {f"models:/{NAME}/1"}
    assert {table.rows for table in back.tables} == {all_images}
    assert more.uri in {table.uri for table in back.tables}
    assert {table.uri for table in back.tables} <= month.made_of(f"models:/{NAME}@champion")[1]
    with pytest.raises(ValueError, match="no champion to go back to: version 1 is its first"):
        promotion.check(Rollback(root=month.root, name=NAME))
    assert not month.retrain().changed, "what was rolled back is not promoted again by its old verdict"
    again = promote(Promote(root=month.root, name=NAME, version="2", reason="it was the better one"))
    assert (again.before, month.champion()) == ("1", "2")
    assert [kind for _, kind in month.moves()] == ["promote", "promote", "rollback", "promote"]
    assert not any(table.changed for table in again.tables)
    assert not follow(Follow(root=month.root, name=NAME)).changed
    assert registry.pin(f"models:/{NAME}@champion") == f"models:/{NAME}/2"
