"""What an experiment is, and the forked processes that its trials run, die and hang in."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

POLL_SECONDS = 0.002  # how exactly a kill meets its moment
PR_SET_PDEATHSIG = 1
HANGS_AFTER = 300.0  # seconds without an end, of a trial that takes a few


@dataclass(frozen=True)
class Found:
    """How many faults a batch put in, and how many broke a promise, by the way in which.

    lost, duplicate: rows, versions, runs or metrics missing or there twice. torn: half of something under its
    final name, or damage unseen. hung: no end within the deadline. broken: any other promise, said in `note`.
    """

    trials: int = 1
    lost: int = 0
    duplicate: int = 0
    torn: int = 0
    hung: int = 0
    broken: int = 0
    note: str = ""

    @property
    def bad(self) -> int:
        return self.lost + self.duplicate + self.torn + self.hung + self.broken

    def __add__(self, other: Found) -> Found:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)[:-1]}
        return Found(**sums, note=self.note or other.note)


NOTHING = Found(trials=0)


@dataclass(frozen=True)
class Experiment:
    """One fault. `batch(seed, folder, shared)` puts it in, in an empty folder, and says what it found.

    goal: trials that the figures of docs/reliability.md want. prepare fills `shared` once a run, in a process
    of its own. lacks: what the machine lacks for it, or ''. quick: part of `make test`, with `few` as the
    batch's size.
    """

    name: str
    promise: str
    goal: int
    batch: Callable[..., Found]
    prepare: Callable[[Path], None] | None = None
    lacks: Callable[[], str] = lambda: ""
    quick: bool = True
    few: dict[str, int] = field(default_factory=dict)
    deadline: float = HANGS_AFTER
    imports: tuple[str, ...] = field(default=(), repr=False)  # by the parent, once


class Ended(NamedTuple):
    """How a forked process ended: its exit code (a signal's number negative), what it gave, CPU seconds."""

    code: int
    value: Any
    seconds: float

    def given(self) -> Any:
        """What it gave; an error if it gave none."""
        if self.code:
            raise RuntimeError(f"a process ended with {self.code}: {self.value}")
        return self.value


class Child:
    """A forked process that runs `body()`, its output in `log`; the leader of a session of its own."""

    def __init__(self, body: Callable[[], Any], log: Path):
        self.log = log
        self._ours, theirs = socket.socketpair()  # `write` is a system call that experiments let fail
        sys.stdout.flush()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            self._ours.close()
            _run(body, theirs, log, parent)
        theirs.close()
        self._clock = (~self.pid << 3) | 2  # Linux's clock of a process's CPU time

    def seconds(self) -> float:
        """CPU seconds that it has used."""
        try:
            return time.clock_gettime(self._clock)
        except OSError:
            return 0.0

    def over(self, seconds: float) -> bool:
        """Whether it has ended; waits so long to know."""
        return bool(select.select([self._ours], [], [], seconds)[0])

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, *, kill_after: float | None = None, deadline: float = HANGS_AFTER) -> Ended:
        """Wait for its end; `kill_after` so many CPU seconds it gets a SIGKILL, if it lives.

        Raises TimeoutError after the deadline, when the whole session of it is killed.
        """
        end, data, used = time.monotonic() + deadline, b"", 0.0
        while True:
            ready, _, _ = select.select([self._ours], [], [], POLL_SECONDS if kill_after else 1.0)
            if ready:
                chunk = self._ours.recv(1 << 16)
                data += chunk
                if not chunk:
                    break
            used = max(used, self.seconds())
            if kill_after is not None and used >= kill_after:
                self.send(signal.SIGKILL)
                kill_after = None
            if time.monotonic() > end:
                self.end()
                raise TimeoutError(f"no end within {deadline:g} s: {self.tail()}")
        self._ours.close()
        _, status, usage = os.wait4(self.pid, 0)
        value = json.loads(data) if data else None
        return Ended(os.waitstatus_to_exitcode(status), value, usage.ru_utime + usage.ru_stime)

    def end(self) -> None:
        """Kill it with all that it started."""
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._ours.close()

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-500:] if self.log.exists() else ""


def _run(body: Callable[[], Any], answer: socket.socket, log: Path, parent: int) -> None:
    """The child's life; it never returns, and does not outlive its parent."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:  # nothing may escape to the parent's own code, which this process has a copy of
        value, code = _answer_of(body)
        answer.sendall(json.dumps(value).encode())
    finally:
        os._exit(code)


def _answer_of(body: Callable[[], Any]) -> tuple[Any, int]:
    """What a body gives, or how it failed, and the exit code."""
    try:
        return body(), 0
    except SystemExit as error:
        return None, int(error.code or 0)
    except BaseException as error:
        with suppress(Exception):  # a disk may be full on purpose, and files refused
            traceback.print_exc()
            sys.stderr.flush()
        return f"{type(error).__name__}: {error}"[:2000], 1


def in_child(body: Callable[[], Any], log: Path, **how: Any) -> Ended:
    """Run `body` in a forked process to its end."""
    return Child(body, log).wait(**how)


def found_in_child(look: Callable[[], Found], log: Path) -> Found:
    """What `look` finds, looked for in a forked process: libraries' threads must not meet a later fork."""
    return Found(**in_child(lambda: vars(look()), log).given())


def counted(found: list[Any], wanted: list[Any]) -> Found:
    """What is missing of the wanted, and what is there twice; anything unwanted breaks a promise."""
    lost = sorted(map(str, set(wanted) - set(found)))
    unwanted = sorted(map(str, set(found) - set(wanted)))
    duplicate = len(found) - len(set(found))
    told = [
        f"{what}: {', '.join(some[:3])}" for what, some in (("lost", lost), ("unwanted", unwanted)) if some
    ]
    return Found(0, len(lost), duplicate, broken=len(unwanted), note="; ".join(told))


def unless(holds: bool, note: str) -> Found:
    """A broken promise, unless it holds."""
    return NOTHING if holds else Found(0, broken=1, note=note)
