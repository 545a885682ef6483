"""A month of production in minutes: schedule's days one after the other, everything asserted after each.

The flows run in this process, on one local Prefect server and one MLflow store, as a `serve` would run them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from PIL import Image
from prefect.client.orchestration import get_client
from sklearn.datasets import load_digits

from data.tables import read_latents
from flows import cli, promotion, registry
from flows.config import Drift, Encode, Follow, Lineage, Promote, Retrain, Rollback
from flows.drift import drift
from flows.encode import encode
from flows.follow import follow
from flows.lineage import lineage
from flows.promote import promote
from flows.results import Drifted, Retrained, Table
from flows.retrain import retrain
from flows.rollback import rollback

NAME = "vae-month"
# Shuffled, for they come ordered by who wrote them, which is a drift of its own.
DIGITS = np.random.default_rng(0).permutation(np.rint(load_digits().images * 255 / 16).astype(np.uint8))


class Month:
    """The folder that images arrive in, and what a scheduler runs on it."""

    def __init__(self, root: Path):
        self.root, self.images = root / "state", root / "images"
        self.source = f"folder:{self.images}"

    def arrive(self, start: int, stop: int, turned: float = 0.0) -> None:
        self.images.mkdir(exist_ok=True)
        for index in range(start, stop):
            image = Image.fromarray(DIGITS[index]).rotate(turned)
            image.save(self.images / f"{index:04d}.png")

    def retrain(self, **changes: Any) -> Retrained:
        training = {"epochs": 30, "batch_size": 32}
        size = {"height": 8, "width": 8, "channels": 1}
        settings = {"training": training, "decode": size, "importance_samples": 5, "count": 4, **changes}
        config = Retrain(root=self.root, source=self.source, preset="digits", model_name=NAME, **settings)
        return retrain(config)

    def encode(self) -> Table:
        """The incremental encode, into tables of its own beside those of the retrain."""
        champion = f"models:/{NAME}@champion"
        return encode(Encode(root=self.root, model=champion, source=self.source, follow=True))

    def drift(self) -> Drifted:
        """The arrived images against those of the champion's own snapshot."""
        return drift(Drift(root=self.root, model=f"models:/{NAME}@champion", source=self.source))

    def champion(self) -> str:
        """By MLflow's own client."""
        return str(mlflow.MlflowClient().get_model_version_by_alias(NAME, "champion").version)

    def moves(self) -> list[tuple[str, str]]:
        return [(move.version, move.kind) for move in promotion.history(self.root, NAME)]

    def made_of(self, thing: str) -> tuple[set[str], set[str]]:
        """The models and the tables of the lineage of a thing."""
        found = lineage(Lineage(root=self.root, thing=thing))
        return {model.uri for model in found.models}, {table.uri for table in found.tables}


@pytest.fixture
def month(tmp_path: Path, prefect_server: str) -> Iterator[Month]:
    before = mlflow.get_tracking_uri()
    made = Month(tmp_path)
    made.root.mkdir()
    mlflow.set_tracking_uri(f"sqlite:///{made.root}/mlflow.db")
    yield made
    mlflow.set_tracking_uri(before)


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


def test_a_month(month: Month) -> None:
    # Day 1: the first half trains, the first sound version is champion, its latents are there.
    month.arrive(0, 600)
    first = month.retrain()
    assert first.verdict.promoted, first.verdict.reason
    assert (month.champion(), month.moves()) == ("1", [("1", "promote")])
    assert first.latents is not None
    assert first.latents.rows == 600
    table = month.encode()
    assert (table.rows, table.changed) == (600, True)
    dataset = first.ingested.fingerprint
    assert month.made_of(dataset)[0] == {f"models:/{NAME}/1"}
    assert month.made_of(table.uri)[1] >= {table.uri, first.latents.uri, first.ingested.snapshot}
    assert "Completed" in flow_runs("retrain")

    # Day 2: nothing new, nothing done.
    runs = len(mlflow.MlflowClient().search_runs(["1"]))
    assert not month.retrain().changed
    assert not month.encode().changed
    assert len(mlflow.MlflowClient().search_runs(["1"])) == runs

    # Day 3: new images; the incremental encode appends them to the same table.
    month.arrive(600, 700)
    before = dict(zip(*read_latents(table.uri), strict=True))
    more = month.encode()
    assert (more.uri, more.rows, more.changed) == (table.uri, 700, True)
    ids, latents = read_latents(more.uri)
    assert before.keys() < set(ids)
    for id, row in zip(ids, latents, strict=True):
        np.testing.assert_array_equal(row, before.get(id, row))

    # They are like those the model knows.
    assert not month.drift().drift

    # Day 4: turned images raise the alarm, an event that a deployment may wait for; the retrain on all
    # images makes a version that is surely better on them.
    month.arrive(700, 1400, turned=90)
    drifted = month.drift()
    assert drifted.drift, drifted.reason
    assert events_of(f"vae.model.{NAME}") >= {"vae.model.promoted", "vae.drift.detected"}
    second = month.retrain()
    assert second.verdict.promoted, second.verdict.reason
    assert second.verdict.difference is not None
    assert second.verdict.difference.low > 0
    assert (month.champion(), month.moves()[-1]) == ("2", ("2", "promote"))
    followed = {table.uri: table for table in second.followed}
    assert all(table.model == f"models:/{NAME}/2" and table.rows == 1400 for table in followed.values())
    assert len(followed) == 2, "the retrain's own table and the successor of the incremental one"
    models, tables = month.made_of(second.ingested.fingerprint)
    assert models == {f"models:/{NAME}/2"}
    assert set(followed) < tables
    assert table.uri not in followed, "another model's latents are another table"

    # Day 5: a bad configuration is refused, a worse model is not promoted, and nothing else changes.
    assert cli.main(["retrain", "--source", month.source, "--epoch", "3", "--root", str(month.root)]) == 2
    worse = month.retrain(training={"epochs": 1, "batch_size": 32})
    assert not worse.verdict.promoted
    assert "not surely better than version 2's" in worse.verdict.reason or "collapsed" in worse.verdict.reason
    assert worse.latents is not None
    assert worse.latents.model == f"models:/{NAME}/2"
    assert month.champion() == "2"

    # Day 6: back to the version before, its tables included; once more is refused; by hand forward again.
    back = rollback(Rollback(root=month.root, name=NAME))
    assert (month.champion(), month.moves()[-1]) == ("1", ("1", "rollback"))
    assert {table.model for table in back.tables} == {f"models:/{NAME}/1"}
    assert {table.rows for table in back.tables} == {1400}
    assert more.uri in {table.uri for table in back.tables}
    with pytest.raises(ValueError, match="no champion to go back to: version 1 is its first"):
        promotion.check(Rollback(root=month.root, name=NAME))
    assert not month.retrain().changed, "what was rolled back is not promoted again by its old verdict"
    again = promote(Promote(root=month.root, name=NAME, version="2", reason="it was the better one"))
    assert (again.before, month.champion()) == ("1", "2")
    assert not any(table.changed for table in again.tables)
    assert not follow(Follow(root=month.root, name=NAME)).changed
    assert registry.pin(f"models:/{NAME}@champion") == f"models:/{NAME}/2"
