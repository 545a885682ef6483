"""What the benchmarks of tables leave: a JSON of results, and their table in docs/tables.md."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
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
    file = ROOT / "benchmarks/results" / f"{name}.json"
    file.write_text(json.dumps(report, indent=2) + "\n")
    page = PAGE.read_text()
    before, begin, rest = page.partition(f"<!-- begin {name} -->\n")
    _, end, after = rest.partition(f"<!-- end {name} -->")
    PAGE.write_text(f"{before}{begin}\n{text}\n\n{end}{after}")


def results(name: str) -> dict[str, Any]:
    """What was kept."""
    return json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text())


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


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
