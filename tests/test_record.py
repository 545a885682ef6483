"""The record's command: a call that runs out of time goes on, and ends as one that had all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def idx(tmp_path: Path) -> Path:
    """A folder of idx files with 300 training and 30 test images."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 300), ("t10k", 30)):
        shape = b"".join(size.to_bytes(4, "big") for size in (count, 28, 28))
        pixels = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8).tobytes()
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + shape + pixels)
        labels = bytes(count)
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + shape[:4] + labels)
    return tmp_path


def call(idx: Path, build: Path, minutes: float) -> str:
    """One call of the smallest row in miniature, with its files under `build`."""
    code = (
        f"import sys, pathlib; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import record\n"
        f"record.BUILD = pathlib.Path({str(build)!r})\n"
        f"sys.argv = ['record', '--row', 'mnist-cpu', '--data', {str(idx)!r}, '--device', 'cpu', "
        f"'--miniature', '--minutes', '{minutes}']\nrecord.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout


@pytest.mark.slow
def test_a_call_that_ran_out_of_time_goes_on_to_the_same_scores(idx: Path, tmp_path: Path) -> None:
    assert "done" in call(idx, tmp_path / "whole", 5)
    assert "the same command goes on" in call(idx, tmp_path / "parts", 0)  # not a step
    assert "the same command goes on" in call(idx, tmp_path / "parts", 0.03)
    assert "done" in call(idx, tmp_path / "parts", 5)
    whole, parts = (
        json.loads((tmp_path / name / "miniature-mnist-cpu-seed0/scores-k10-0.json").read_text())
        for name in ("whole", "parts")
    )
    assert whole == parts
    assert len(whole["iw_bound"]) == 20
