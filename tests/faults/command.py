"""SIGKILL of the whole flow: `vae-flows retrain` as a user runs it, with Prefect's engine and server."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults import bodies, rivals
from tests.faults.outages import listener
from tests.faults.trials import NOTHING, Experiment, Found, found_in_child, in_child, unless

Command = subprocess.Popen[bytes]
KILLS = 5  # a batch
FIRST, LAST = 3.0, 14.0  # CPU seconds into a command at which it is killed; imports take the first three
DEADLINE = 280.0


def configure(file: Path) -> None:
    """The configuration of the undisturbed run as a file."""
    from flows.commands import to_toml
    from flows.config import Retrain

    told = {name: value for name, value in bodies.SETTINGS.items() if name in Retrain.model_fields}
    values = Retrain(**told).model_dump(mode="json")
    file.write_text(to_toml({name: value for name, value in values.items() if name != "root"}))


def batch(seed: int, folder: Path, shared: Path) -> Found:
    """One root, kills at random moments, then the same command once more."""
    rng, facts = np.random.default_rng(seed), json.loads((shared / "facts.json").read_text())
    root, found = folder / "root", NOTHING
    for number in range(KILLS):
        process = begin(root, shared, folder / f"log-{number}")
        if end(process, rng.uniform(FIRST, LAST), lambda process=process: process.kill()) != -signal.SIGKILL:
            break
        found += Found()
    return found + finished(root, folder, shared, facts)


def finished(root: Path, folder: Path, shared: Path, facts: dict[str, Any]) -> Found:
    """The command once more, to its end, and what it leaves beside what an undisturbed one does."""
    found = NOTHING
    if (code := end(begin(root, shared, folder / "log"))) != 0:
        said = (folder / "log").read_text(errors="replace")[-500:]
        return found + Found(broken=1, note=f"the last run ended with {code}: {said}")
    result = told(folder / "log.json")
    return found + found_in_child(lambda: bodies.compared(root, result, facts), folder / "log")


def told(file: Path) -> dict[str, Any]:
    """The facts of a printed result that an undisturbed run must equal."""
    result = json.loads(file.read_text())
    return {
        "weights": result["trained"]["weights"],
        "scores": {name: one["value"] for name, one in result["scores"]["scores"].items()},
        "version": result["version"],
        **{name: result[name]["uri"] for name in ("latents", "samples")},
    }


def begin(root: Path, shared: Path, log: Path, **environment: str) -> Command:
    """The command on a root; what it says goes to `log`, its result beside it."""
    configuration = shared / "retrain.toml"
    if not configuration.exists():
        in_child(lambda: configure(configuration), log).given()
    line = [sys.executable, "-m", "flows.cli", "retrain", "--config", str(configuration), "--json"]
    with open(log, "ab") as said, open(log.with_suffix(".json"), "wb") as result:
        return subprocess.Popen(
            [*line, "--root", str(root)], stdout=result, stderr=said, env=os.environ | environment
        )


def end(process: Command, moment: float = math.inf, then: Callable[[], object] = print) -> int:
    """Wait for its exit code; `then` is called once it has used so many CPU seconds."""
    late, clock = time.monotonic() + DEADLINE, (~process.pid << 3) | 2
    while process.poll() is None:
        if time.clock_gettime(clock) >= moment:
            then()
            moment = math.inf
        if time.monotonic() > late:
            process.kill()
            raise TimeoutError(f"no end within {DEADLINE:g} s")
        time.sleep(0.005)
    return process.returncode


def without_prefect(seed: int, folder: Path, shared: Path) -> Found:
    """Prefect's server dies at a random moment of a retrain, and stays away or comes back where it was."""
    rng, facts = np.random.default_rng(seed), json.loads((shared / "facts.json").read_text())
    with ExitStack() as stack:
        held = stack.enter_context(listener())
        url = "http://{}:{}/api".format(*held.getsockname())
        servers = [stack.enter_context(prefect_server(held, folder))]

        def restart() -> None:
            servers[0].kill()
            if seed % 2:
                stack.enter_context(prefect_server(held, folder))
            else:
                held.close()  # or connections would be taken and never answered

        process = begin(folder / "root", shared, folder / "first", PREFECT_API_URL=url)
        code = end(process, rng.uniform(FIRST, LAST), restart)
    said = (folder / "first").read_text(errors="replace").strip().splitlines()
    # At exit Prefect's threads may have a last word after it.
    clear = code == 0 or (code == 1 and any(line.startswith("vae-flows: retrain failed") for line in said))
    found = Found() + unless(clear, f"ended with {code}: {said[-3:]}")
    return found + finished_anew(folder / "root", folder, shared, facts)


def finished_anew(root: Path, folder: Path, shared: Path, facts: dict[str, Any]) -> Found:
    """As `finished`, but a run that FAILED is over and the next is another."""
    code = end(begin(root, shared, folder / "log"))
    if code != 0:
        return Found(0, broken=1, note=f"the last run ended with {code}")
    result = told(folder / "log.json")
    return found_in_child(lambda: rivals.once(root, [result], facts), folder / "log")


@contextmanager
def prefect_server(held: socket.socket, folder: Path) -> Iterator[Command]:
    """Prefect's application on a socket that listens already, its database in the folder."""
    database = f"sqlite+aiosqlite:///{folder}/prefect.db"
    line = [sys.executable, "-m", "flows.local_server", str(held.fileno())]
    server = subprocess.Popen(
        line,
        stdin=subprocess.PIPE,
        pass_fds=[held.fileno()],
        env=os.environ | {"PREFECT_API_DATABASE_CONNECTION_URL": database},
    )
    try:
        yield server
    finally:
        server.kill()
        server.wait()


EXPERIMENTS = (
    Experiment(
        "SIGKILL of the whole flow",
        "The command killed at any moment, Prefect's engine and server included: run again, it ends as an "
        "undisturbed one.",
        goal=30,
        batch=batch,
        prepare=bodies.prepare,
        imports=bodies.IMPORTS,
        quick=False,
        deadline=7 * DEADLINE,
    ),
    Experiment(
        "Prefect's server gone or restarted",
        "Work goes on or fails in one clear line; the data stays right, and the same command ends well.",
        goal=10,
        batch=without_prefect,
        prepare=bodies.prepare,
        imports=bodies.IMPORTS,
        quick=False,
        deadline=4 * DEADLINE,
    ),
)
