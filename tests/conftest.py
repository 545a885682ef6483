"""What every test stands on: quiet libraries, one thread, state in a temporary folder."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Generator, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from parts import need

from flows.environment import make_root, prepare

collect_ignore = ["faults"]  # experiments, not tests: test_faults.py runs them
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Neither the user's servers nor, with several workers, another worker's files.
for name in (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_REGISTRY_URI",
    "PREFECT_API_URL",
    "PREFECT_API_DATABASE_CONNECTION_URL",
):
    os.environ.pop(name, None)
SESSION_ROOT = Path(tempfile.mkdtemp(prefix="vae-flows-tests-"))
prepare(SESSION_ROOT)  # before any test module imports prefect or mlflow


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """One local Prefect server for the session; its API's URL."""
    import prefect.settings as settings

    from flows.local_server import prefect_api

    make_root(SESSION_ROOT)
    with prefect_api():  # for flows in this process; the variable is for the commands that tests start
        url = str(settings.get_current_settings().api.url)
        os.environ["PREFECT_API_URL"] = url
        yield url
        del os.environ["PREFECT_API_URL"]


@pytest.fixture(scope="session")
def fashion_mnist() -> Path:
    """The folder of Debian's package dataset-fashion-mnist."""
    folder = Path("/usr/share/datasets/fashion-mnist")
    need(folder.is_dir(), "Debian's package dataset-fashion-mnist")
    return folder


class Inbox(BaseHTTPRequestHandler):
    """Where a notification block's webhook posts to."""

    received: list[str]

    def do_POST(self) -> None:
        self.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def inbox() -> Iterator[tuple[str, list[str]]]:
    """A webhook on loopback and the texts that it has received."""
    handler = type("Handler", (Inbox,), {"received": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.received
    server.shutdown()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """CI installs every part that a test may need: there, a skip for a missing one is a failure."""
    report = yield
    if report.skipped and os.environ.get("CI") and "is not installed" in str(report.longrepr):
        report.outcome = "failed"
    return report
