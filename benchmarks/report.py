"""What the benchmarks of tables leave: a JSON of results, and their table in docs/tables.md."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Container, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILES = Path(tempfile.gettempdir()) / "vae-flows-benchmark"  # what benchmarks make once and keep
PAGE = ROOT / "docs/tables.md"
LIBRARIES = (
    "torch",
    "torchvision",
    "datasets",
    "pyarrow",
    "pandas",
    "pillow",
    "simplejpeg",
    "opencv-python-headless",
)


def keep(name: str, report: dict[str, Any], text: str) -> None:
    """Write benchmarks/results/NAME.json, and the text between the page's two comments of that name."""
    write(name, report)
    page = PAGE.read_text()
    before, begin, rest = page.partition(f"<!-- begin {name} -->\n")
    _, end, after = rest.partition(f"<!-- end {name} -->")
    PAGE.write_text(f"{before}{begin}\n{text}\n\n{end}{after}")


def write(name: str, report: dict[str, Any]) -> None:
    """Write benchmarks/results/NAME.json."""
    file = ROOT / "benchmarks/results" / f"{name}.json"
    file.write_text(json.dumps(report, indent=2) + "\n")


def results(name: str) -> dict[str, Any]:
    """What was written; empty where nothing was."""
    file = ROOT / "benchmarks/results" / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def play(
    name: str,
    cases: Sequence[str],
    measure: Callable[[str], dict[str, Any]],
    *,
    rounds: int,
    minutes: float,
    once: Container[str] = (),
) -> dict[str, list[dict[str, Any]]] | None:
    """Run every case so many times (those in `once` but once), in interleaved rounds; the runs of each.

    Each run is written to results/NAME.json as it ends. Stopped, or out of minutes (then None), the next
    call goes on where this one was; a call after the last begins anew.
    """
    runs: dict[str, list[dict[str, Any]]] = results(name).get("runs", {})
    if set(runs) - set(cases) or next_case(runs, cases, rounds, once) is None:
        runs = {}
    end = time.monotonic() + 60 * minutes
    while case := next_case(runs, cases, rounds, once):
        if time.monotonic() > end:
            print(f"stopped after {minutes:g} minutes: the same command goes on with {case}")
            return None
        found = measure(case)
        print(case, json.dumps(found), file=sys.stderr, flush=True)
        runs.setdefault(case, []).append(found)
        write(name, {**machine(), "rounds": rounds, "runs": runs})
    return runs


def next_case(
    runs: Mapping[str, Sequence[Any]], cases: Sequence[str], rounds: int, once: Container[str] = ()
) -> str | None:
    """The case whose turn it is; None when all have had theirs.

    >>> next_case({}, "ab", 2, once="b"), next_case({"a": [1]}, "ab", 2, once="b")
    ('a', 'b')
    >>> next_case({"a": [1], "b": [1]}, "ab", 2, once="b")
    'a'
    >>> next_case({"a": [1, 2], "b": [1]}, "ab", 2, once="b")
    """
    for number in range(1, rounds + 1):
        for case in cases:
            if len(runs.get(case, ())) < (1 if case in once else number):
                return case
    return None


def whole_rounds(
    runs: Mapping[str, list[dict[str, Any]]], cases: Sequence[str], once: Container[str] = ()
) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """How many rounds are complete, and the runs of those; ValueError where none is.

    >>> whole_rounds({"a": [{"x": 1}, {"x": 2}], "b": [{"x": 3}]}, "ab")
    (1, {'a': [{'x': 1}], 'b': [{'x': 3}]})
    """
    rounds = min(len(runs.get(case, ())) for case in cases if case not in once)
    if next_case(runs, cases, 1, once):
        raise ValueError(f"no round is complete: the next case is {next_case(runs, cases, 1, once)}")
    return rounds, {case: runs[case][:rounds] for case in cases}


def medians(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure."""
    return {figure: statistics.median(run[figure] for run in rounds) for figure in rounds[0]}


def alone(program: str, *arguments: str) -> dict[str, Any]:
    """One measurement in a process of its own: the last line that `program --measure ...` prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    environment["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    command = [sys.executable, program, "--measure", *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    """Where, when and with what this was measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line for line in lines if line.startswith("model name")), "")
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "cpu": model.partition(": ")[2],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {
            name: found for name in (*LIBRARIES, "opencv-python-headless") if (found := _version(name))
        },
    }


def place(report: dict[str, Any]) -> str:
    """The same in a phrase."""
    return (
        f"{report['date'][:10]}, {report['cores']} shared cores of {report['cpu']}, Python {report['python']}"
    )


def rounds_told(rounds: int) -> str:
    """How often each case was run.

    >>> rounds_told(1), rounds_told(3)
    ('One run each', 'Medians of 3 interleaved rounds')
    """
    return "One run each" if rounds == 1 else f"Medians of {rounds} interleaved rounds"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
