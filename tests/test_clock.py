"""Where time goes: counted to the stage that took it, whatever thread it was spent in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from data.batches import stream
from data.clock import Timed, add, seconds
from data.images import DecodePath
from data.sources import open_source


def test_sums_over_threads_lose_nothing() -> None:
    before = seconds().get("test", 0.0)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: add("test", 0.5), range(1000)))
    assert seconds()["test"] - before == 500


def test_waiting_for_items_is_not_working_on_them() -> None:
    def slow() -> Iterator[int]:
        for item in range(3):
            time.sleep(0.02)
            yield item

    items = Timed(slow())
    for _ in items:
        time.sleep(0.05)
    assert 0.06 <= items.seconds < 0.15


def test_large_images_are_mostly_decoded(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in range(8):
        Image.fromarray(rng.integers(0, 256, (800, 800, 3), dtype=np.uint8)).save(tmp_path / f"{name}.jpg")
    before = seconds()
    batches = list(stream(open_source(f"folder:{tmp_path}"), DecodePath(height=32, width=32, channels=3)))
    spent = {stage: total - before.get(stage, 0.0) for stage, total in seconds().items()}
    assert sum(len(batch.images) for batch in batches) == 8
    assert spent["decode"] > spent["read"] > 0
