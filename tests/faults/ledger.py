"""The ledger of trials, a JSON line each batch, and what is written from it: the table and the page."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.faults.trials import Experiment, Found

HOME = Path(__file__).parents[2]
COUNTS = ("lost", "duplicate", "torn", "hung", "broken")
HEADS = ("trials", *COUNTS, "mended", "seed")


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
        """All its trials, and what is broken: what a batch found, unless its seed has since been run well."""
        broken = [
            Found(0, **{name: line[name] for name in (*COUNTS, "note")}) for line in self._broken(fault)
        ]
        return sum(broken, Found(sum(line["trials"] for line in self.of(fault))))

    def mended(self, fault: str) -> int:
        """What batches found whose seeds have since been run well."""
        return sum(map(bad, self.of(fault))) - sum(map(bad, self._broken(fault)))

    def bad_seeds(self, fault: str) -> list[int]:
        """The seeds that repeat what is broken."""
        return list(dict.fromkeys(line["seed"] for line in self._broken(fault)))

    def _broken(self, fault: str) -> list[dict[str, Any]]:
        """The batches of seeds whose last batch broke a promise."""
        last = {line["seed"]: line for line in self.of(fault)}
        return [line for line in self.of(fault) if bad(last[line["seed"]])]


def bad(line: dict[str, Any]) -> int:
    """How many promises a batch broke."""
    return sum(line[name] for name in COUNTS)


def machine() -> str:
    """Where this runs, in a phrase."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    return f"{os.cpu_count()} cores of {model or platform.machine()}, Python {platform.python_version()}"


def commit() -> str:
    """The commit of this checkout."""
    line = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(line, cwd=HOME, capture_output=True, text=True).stdout.strip()


def cells(ledger: Ledger, one: Experiment) -> list[str]:
    """An experiment's figures: trials, what is broken, what was and is mended, a seed that repeats it."""
    total, seeds = ledger.total(one.name), ledger.bad_seeds(one.name)
    counts = [total.trials, *(getattr(total, name) for name in COUNTS), ledger.mended(one.name)]
    return [*(f"{count:,}" for count in counts), str(seeds[0]) if seeds else "-"]


def table(ledger: Ledger, experiments: Sequence[Experiment]) -> str:
    """The table as text, its columns aligned."""
    lines = [["fault", *HEADS], *([one.name, *cells(ledger, one)] for one in experiments)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )
