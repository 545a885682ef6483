"""What every test stands on: quiet libraries, one thread, state in a temporary folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """CI installs every part that a test may need: there, a skip for a missing one is a failure."""
    report = yield
    if report.skipped and os.environ.get("CI") and "is not installed" in str(report.longrepr):
        report.outcome = "failed"
    return report
