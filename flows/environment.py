"""Where Prefect and MLflow keep their state, settled before either is imported.

Both read their settings from the environment at import, so a command calls `prepare` first. What the user has
set is kept: only what is unset falls back to local files under the root, with no server and nothing sent out.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "vae_flows",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
    # `flows.spool` asks again, and knows which calls may be made twice.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # Without a heartbeat nobody notices that a run was killed with all of its process.
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    # Threads that wait by spinning make two of them ten times slower than one on a busy machine.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def local_mlflow(root: Path) -> Path:
    """MLflow's database under a root, where no other is set."""
    return root.resolve() / "mlflow.db"


def prepare(root: Path, log_level: str = "CRITICAL") -> None:
    """Set what is unset: quiet libraries, MLflow and Prefect on SQLite files under `root`.

    `log_level` is Prefect's own: by default a command's own log lines tell what happens, and its error.
    """
    root = root.resolve()
    local = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{local_mlflow(root)}",
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{root}/prefect/prefect.db",
        # Two commands on one root share one SQLite file: wait for the other's lock rather than fail.
        "PREFECT_API_DATABASE_TIMEOUT": "120",
        "PREFECT_LOGGING_LEVEL": log_level,
    }
    for name, value in {**QUIET, **local}.items():
        os.environ.setdefault(name, value)
    _take_logins_out_of_urls()
    # Where a worker runs a flow, nobody but Prefect handles its log, and Prefect sets no level.
    logging.getLogger("vae_flows").setLevel(logging.INFO)


def _take_logins_out_of_urls() -> None:
    """User and password go where both libraries look for them beside the URL, which is shown and kept."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "PREFECT_API_URL"):
        parts = urlsplit(os.environ.get(name, ""))
        if parts.scheme not in ("http", "https") or parts.password is None:
            continue
        user, password = unquote(parts.username or ""), unquote(parts.password)
        if name == "PREFECT_API_URL":
            os.environ.setdefault("PREFECT_API_AUTH_STRING", f"{user}:{password}")
        else:
            os.environ.setdefault("MLFLOW_TRACKING_USERNAME", user)
            os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", password)
        os.environ[name] = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def make_root(root: Path) -> None:
    """Create the root folder, or say in one line why it can't be used."""
    try:
        (root / "prefect").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"root {str(root)!r} can't be written ({error.strerror}): give another --root"
        ) from error
    if not os.access(root, os.R_OK | os.W_OK | os.X_OK):
        raise ValueError(f"root {str(root)!r} can't be read and written: give another --root")
