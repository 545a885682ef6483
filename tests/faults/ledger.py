"""The ledger of trials, a JSON line each batch, and what is written from it: the table and the page."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.faults.trials import NOTHING, Experiment, Found

HOME = Path(__file__).parents[2]
COUNTS = ("lost", "duplicate", "torn", "hung", "broken")


class Ledger:
    """Batches that have run, appended to a file; a run goes on with the seeds that are not in it."""

    def __init__(self, path: Path):
        self.path = path
        text = path.read_text() if path.exists() else ""
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
        self._here = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), "commit": commit()}

    def append(self, fault: str, seed: int, found: Found, seconds: float) -> None:
        """One batch, on disk before the next one begins."""
        line = {"fault": fault, "seed": seed, **asdict(found), "seconds": round(seconds, 2), **self._here}
        self.lines.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def of(self, fault: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["fault"] == fault]

    def next_seed(self, fault: str, first: int) -> int:
        """The first seed from `first` on that this fault has not been tried with."""
        tried = {line["seed"] for line in self.of(fault)}
        return next(seed for seed in range(first, first + len(tried) + 1) if seed not in tried)

    def total(self, fault: str) -> Found:
        """All its batches together."""
        names = ("trials", *COUNTS, "note")
        return sum((Found(**{name: line[name] for name in names}) for line in self.of(fault)), NOTHING)

    def bad_seed(self, fault: str) -> str:
        """A seed that repeats the first broken promise; '' where there is none."""
        return next((str(line["seed"]) for line in self.of(fault) if any(line[n] for n in COUNTS)), "")


def machine() -> str:
    """Where this runs, in a phrase."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    return f"{os.cpu_count()} cores of {model or platform.machine()}, Python {platform.python_version()}"


def commit() -> str:
    """The commit of this checkout."""
    line = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(line, cwd=HOME, capture_output=True, text=True).stdout.strip()


def rows(ledger: Ledger, experiments: Iterable[Experiment]) -> list[list[str]]:
    """A line each experiment: fault, trials, what was broken, the seed that repeats it."""
    found = []
    for one in experiments:
        total = ledger.total(one.name)
        counts = [f"{getattr(total, name):,}" for name in COUNTS]
        found.append([one.name, f"{total.trials:,}", *counts, ledger.bad_seed(one.name) or "-"])
    return found


def table(ledger: Ledger, experiments: Sequence[Experiment]) -> str:
    """The table as text, its columns aligned."""
    lines = [["fault", "trials", *COUNTS, "seed"], *rows(ledger, experiments)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )
