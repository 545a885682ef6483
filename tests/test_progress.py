"""Progress: the same facts on a terminal, in the log, in MLflow and in Prefect."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from pathlib import Path

import pytest
from pipeline import registry_of
from prefect import flow
from prefect.artifacts import Artifact

from data import clock
from flows import progress as module
from flows.config import Ingest
from flows.progress import State, progress
from flows.tracking import tracked


def test_a_state_says_how_far_how_fast_what_is_left_and_what_is_slow() -> None:
    state = State("encode", 500, 2000, 10.0, 50.0, {"read": 1.0, "decode": 7.0, "model": 2.0}, "images")
    assert str(state) == "500/2,000 (25%) images, 50/s, 0:30 left, mostly decode"
    assert str(State("encode", 0, 0, 0.0, 0.0, {}, "")) == "0/0 "


def test_log_lines_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vae_flows")
    logging.getLogger("vae_flows").propagate = True
    with progress("encode") as advance:
        advance(1000, 1100, "images")  # by an earlier attempt: nobody's rate
        time.sleep(0.1)
        clock.add("write", 5.0)
        advance(1100, 1100, "images")
    (line,) = {said for said in caplog.messages if said.startswith("encode:")}  # other handlers repeat it
    assert line.startswith("encode: 1,100/1,100 (100%) images, ")
    assert line.endswith(", mostly write")
    assert 300 < int(line.split(", ")[1].removesuffix("/s").replace(",", "")) <= 1000


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, ours = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with os.fdopen(ours, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with progress("encode") as advance:
            advance(0, 200, "images")
            clock.add("decode", 5.0)
            clock.passed(50)
            time.sleep(0.2)
            advance(200, 200, "images")
    drawn = everything(terminal)
    assert "encode" in drawn
    assert "50/200" in drawn  # between two of the step's own reports
    assert "200/200" in drawn
    assert "mostly decode" in drawn


def everything(terminal: int) -> str:
    """What was written to a terminal whose other end is closed: one read gives but a part of it."""
    drawn = b""
    with contextlib.suppress(OSError):  # EIO, after the last byte
        while part := os.read(terminal, 4096):
            drawn += part
    os.close(terminal)
    return drawn.decode()


def test_time_rate_and_where_it_went_are_metrics_of_the_run(tmp_path: Path) -> None:
    with registry_of(tmp_path) as client:
        with tracked(Ingest(root=tmp_path)) as run, progress("ingest", run) as advance:
            time.sleep(0.05)  # to list the source
            advance(0, 10)
            clock.add("read", 3.0)
            clock.add("decode", 1.0)
            time.sleep(0.05)
            advance(10, 10)
        found = client.get_run(run.id).data.metrics
    assert found["time/ingest_share_read"] == pytest.approx(0.75)
    assert found["time/ingest_seconds"] >= 0.1
    assert found["time/ingest_per_second"] == pytest.approx(10 / found["time/ingest_seconds"])


def test_a_long_step_has_an_artifact_in_prefect(monkeypatch: pytest.MonkeyPatch, prefect_server: str) -> None:
    monkeypatch.setattr(module, "LOG_SECONDS", 0.0)

    @flow
    def long() -> None:
        with progress("encode") as advance:
            advance(0, 4, "images")
            advance(3, 4, "images")

    long()
    found = Artifact.get("progress-encode")
    assert found is not None
    assert float(str(found.data)) == 75
    assert "3/4 (75%) images" in str(found.description)
