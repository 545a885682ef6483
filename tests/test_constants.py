"""Constants that a vector function needs are in memory before it is called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(sys.platform != "linux", reason="drops pages as Linux does")
def test_functions_are_as_fast_as_they_can_be_once_their_constants_were_touched() -> None:
    """In a process that has lost them, as benchmarks/pages.py makes one and prints it."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/pages.py"], capture_output=True, text=True, check=True
    )
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    times = {name: [float(cell.replace(",", "")) for cell in cells] for name, *cells in rows[2:]}
    assert {"log1p", "expm1", "softplus"} <= times.keys()
    if all(lost < 3 * found for found, lost, _ in times.values()):
        pytest.skip("this processor takes a masked load in its stride")
    for found, lost, touched in times.values():
        assert touched < max(3 * found, lost / 3)
