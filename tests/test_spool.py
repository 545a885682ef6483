"""Metrics wait on disk while MLflow is away, and arrive once, in order, with their own times."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import requests
from mlflow.entities import Metric
from pipeline import registry_of

from flows import tracking
from flows.config import Train
from flows.figures import grid
from flows.spool import MlflowAwayError, Spool, patiently
from flows.tracking import _AtMlflow


class Run:
    """A run that keeps what arrives, while it is there."""

    def __init__(self, last: dict[str, int] | None = None, *, there: bool = True):
        self.last, self.there = last or {}, threading.Event()
        self.arrived: list[tuple[str, float, int]] = []
        self.times: list[int] = []
        self.pictures: list[tuple[str, int, bytes]] = []
        if there:
            self.there.set()

    def metrics(self, metrics: list[Metric]) -> None:
        if not self.there.is_set():
            raise requests.ConnectionError("refused")
        self.arrived += [(metric.key, metric.value, metric.step) for metric in metrics]
        self.times += [metric.timestamp for metric in metrics]

    def picture(self, name: str, step: int, png: bytes) -> None:
        self.pictures.append((name, step, png))

    def last_step(self, metric: str) -> int:
        return self.last.get(metric, -1)


def test_what_is_added_arrives_in_order_and_leaves_no_file(tmp_path: Path) -> None:
    run, path = Run(), tmp_path / "run.jsonl"
    spool = Spool(path, run)
    spool.add({"a": 1.0, "b": 2.0}, 1)
    spool.add_picture("drawn", 1, b"png")
    spool.add({"a": 3.0}, 2)
    spool.drain(30)
    spool.close()
    assert run.arrived == [("a", 1.0, 1), ("b", 2.0, 1), ("a", 3.0, 2)]
    assert run.pictures == [("drawn", 1, b"png")]
    assert list(tmp_path.iterdir()) == []


def test_while_it_is_away_all_waits_on_disk_and_the_next_process_sends_it(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    spool = Spool(path, Run(there=False))
    spool.add({"a": 1.0}, 1)
    spool.add({"a": 2.0}, 2)
    with pytest.raises(MlflowAwayError, match=r"2 lines within 0\.1 s: they wait in .*run\.jsonl"):
        spool.drain(0.1)
    spool.close()
    times = [json.loads(line)[2] for line in path.read_text().splitlines()]
    run = Run()
    later = Spool(path, run)
    later.add({"a": 3.0}, 3)
    later.drain(30)
    assert run.arrived == [("a", 1.0, 1), ("a", 2.0, 2), ("a", 3.0, 3)]
    assert run.times[:2] == times


def test_a_step_that_has_arrived_is_not_sent_again(tmp_path: Path) -> None:
    run = Run({"a": 2})
    spool = Spool(tmp_path / "run.jsonl", run)
    for step in (1, 2, 3, 3):
        spool.add({"a": float(step)}, step)
    spool.drain(30)
    assert run.arrived == [("a", 3.0, 3)]


def test_a_line_cut_short_is_passed_over(tmp_path: Path) -> None:
    path, run = tmp_path / "run.jsonl", Run()
    path.write_text('["a", 1.0, 17, 1]\n["a", 2.0, 1')
    spool = Spool(path, run)
    spool.add({"a": 3.0}, 3)
    spool.drain(30)
    assert run.arrived == [("a", 1.0, 1), ("a", 3.0, 3)]
    assert run.times[0] == 17


def test_an_error_that_time_does_not_mend_is_raised(tmp_path: Path) -> None:
    class Refusing(Run):
        def metrics(self, metrics: list[Metric]) -> None:
            raise ValueError("no such metric")

    spool = Spool(tmp_path / "run.jsonl", Refusing())
    spool.add({"a": 1.0}, 1)
    with pytest.raises(ValueError, match="no such metric"):
        spool.drain(30)


def test_a_call_is_made_again_until_it_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    answers = iter([requests.ConnectionError(), requests.Timeout(), 7])

    def call() -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patiently(call) == 7


def test_patience_ends_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAE_FLOWS_PATIENCE", "0.01")
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def call() -> None:
        raise requests.ConnectionError("no route to http://me:open-sesame@host/api")

    with pytest.raises(MlflowAwayError, match=r"for 0\.01 s \(no route to http://\*\*\*@host/api\)"):
        patiently(call)


def test_a_picture_whose_arrival_was_not_answered_is_there_once(tmp_path: Path) -> None:
    png = grid(np.zeros((1, 1, 8, 8), np.uint8), columns=1)
    with registry_of(tmp_path) as client:
        experiment = client.create_experiment("pictures", (tmp_path / "artifacts").as_uri())
        run = client.create_run(experiment).info.run_id
        for step in (1, 1, 11):
            _AtMlflow(run, new=True).picture("drawn", step, png)
        paths = [file.path for file in client.list_artifacts(run, "images")]
    assert len([path for path in paths if path.endswith(".png")]) == 2


def test_runs_that_name_a_new_data_set_at_once_all_have_it(tmp_path: Path) -> None:
    """MLflow looks for a data set and then inserts it, and refuses whoever comes in between."""
    with registry_of(tmp_path) as client, ThreadPoolExecutor(4) as pool:
        experiment = client.create_experiment("rivals")
        runs = [tracking.Run(Train()) for _ in range(4)]
        for run in runs:
            run._id = client.create_run(experiment).info.run_id
        for number in range(20):
            name = partial(
                tracking.Run.log_dataset, name="digits", digest=str(number), source="here", split="train"
            )
            list(pool.map(name, runs))
        named = [client.get_run(run.id).inputs.dataset_inputs for run in runs]
    assert [len({one.dataset.digest for one in inputs}) for inputs in named] == [20] * 4
