"""A Prefect API for one command, which ends with it, whatever ends it.

Prefect's own temporary server outlives a parent that is killed (3.8.8: it stays until somebody ends it by
hand). This one is the same application with two differences: it reads its standard input, which closes when
the parent dies, and it inherits a listening socket, so that there is no race for a port.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STARTUP_SECONDS = 300  # the first start creates the database: 10 s of CPU time, more on a busy machine


@contextmanager
def prefect_api(*, services: bool = False) -> Iterator[None]:
    """Give the block a Prefect API: the user's where one is configured, else a local one.

    With `services` the local one also starts what is scheduled, which no single command needs.
    """
    import prefect.settings as settings

    if settings.get_current_settings().api.url:
        yield
        return
    with local_server(services=services) as url:
        # Its log is on the terminal: sent to the server too, the last lines would meet it gone.
        local = {settings.PREFECT_API_URL: url, settings.PREFECT_LOGGING_TO_API_ENABLED: services}
        with settings.temporary_settings(local):
            yield


@contextmanager
def local_server(*, services: bool = False) -> Iterator[str]:
    """A Prefect API on a free loopback port; its URL. With `services` its scheduler and its kin run too."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fd = listener.fileno()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        command = [sys.executable, "-m", "flows.local_server", str(fd), *(["services"] if services else [])]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[fd], start_new_session=True)
    try:
        _wait_until_healthy(server, url)
        yield url
    finally:
        assert server.stdin is not None
        server.stdin.close()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()


def _wait_until_healthy(server: subprocess.Popen[bytes], url: str) -> None:
    """One request is enough: the socket already listens, so it is answered when the application is up."""
    import httpx

    try:
        httpx.get(f"{url}/health", timeout=STARTUP_SECONDS, trust_env=False).raise_for_status()
    except httpx.HTTPError as error:
        raise RuntimeError(f"Prefect's local server did not start (exit code {server.poll()})") from error


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _serve(fd: int, *, services: bool) -> None:
    """Run Prefect's application on an inherited socket until standard input closes."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update({"PREFECT__SERVER_FINAL": "1", "PREFECT_UI_ENABLED": "0"})
    if not services:
        os.environ["PREFECT__SERVER_EPHEMERAL"] = "1"
    import uvicorn

    application = "prefect.server.api.server:create_app"
    config = uvicorn.Config(application, factory=True, log_level="error", timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=fd)])


if __name__ == "__main__":
    _serve(int(sys.argv[1]), services="services" in sys.argv[2:])
