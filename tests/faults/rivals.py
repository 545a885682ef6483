"""Many at once: two runs of the same job, sixteen writers on one table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.faults import bodies
from tests.faults.trials import Child, Experiment, Found, counted, found_in_child, unless

WRITERS, IMAGES = 16, 60


def two_runs(seed: int, folder: Path, shared: Path) -> Found:
    """The same retrain twice at once, one a little later: both end well, everything is there once."""
    root, facts = folder / "root", json.loads((shared / "facts.json").read_text())
    shutil.copytree(shared / "empty", root)
    first = Child(lambda: bodies.retrain(root), folder / "first")
    while first.seconds() < 0.3 * (seed % 10):  # the later one begins when the first has got so far
        if first.over(0.005):
            break
    second = Child(lambda: bodies.retrain(root), folder / "second")
    results = [child.wait().given() for child in (first, second)]
    return Found() + found_in_child(lambda: both_whole(root, results, facts), folder / "log")


def both_whole(root: Path, results: list[dict[str, Any]], facts: dict[str, Any]) -> Found:
    """A run for each process, each ended."""
    runs = bodies.recorded(root)["runs"]
    return once(root, results, facts) + unless(set(runs) == {"FINISHED"}, f"runs are {runs}")


def once(root: Path, results: list[dict[str, Any]], facts: dict[str, Any]) -> Found:
    """One version, one champion, each row once."""
    here = bodies.recorded(root)
    found = counted(here["versions"], facts["versions"]) + unless(here["champion"] == "1", here["champion"])
    for result in results:
        for part in ("weights", "scores", "version"):
            found += unless(result[part] == facts[part], f"{part} differ")
        for name, column in (("latents", "mu"), ("samples", "z")):
            found += bodies.same_rows(result[name], facts[name], column)
    return found


def writers(seed: int, folder: Path, shared: Path) -> Found:
    """Sixteen processes encode the same images to one table."""
    from tests.test_tables import run

    def write() -> list[int]:
        result = run(shared / "images", folder / "tables")
        return [result.rows, result.files]

    started = [Child(write, folder / f"writer-{number}") for number in range(WRITERS)]
    results = [child.wait().given() for child in started]
    found = unless(results == [[IMAGES, IMAGES // 10]] * WRITERS, f"writers say {results}")
    return Found() + found + found_in_child(lambda: whole(folder / "tables"), folder / "log")


def whole(tables: Path) -> Found:
    from data.tables import read_latents
    from data.upkeep import verify

    (table,) = tables.iterdir()
    verify(str(table))
    left = [path.name for path in table.rglob(".*.tmp")]
    files = len(list(table.rglob("part-*.parquet")))
    found = counted(read_latents(str(table))[0].tolist(), [f"{value:04d}.png" for value in range(IMAGES)])
    return found + unless(not left and files == IMAGES // 10, f"{files} parts, drafts {left}")


def prepare_images(shared: Path) -> None:
    from tests.test_tables import folder_of

    folder_of(shared / "images", range(IMAGES))


EXPERIMENTS = (
    Experiment(
        "two runs of the same job at once",
        "Each shard, version and alias is committed once, none is lost, and both runs end well.",
        goal=20,
        batch=two_runs,
        prepare=bodies.prepare,
        imports=bodies.IMPORTS,
    ),
    Experiment(
        "sixteen writers on one table",
        "Every row once; no part beyond the plan's.",
        goal=50,
        batch=writers,
        prepare=prepare_images,
        imports=("tests.test_tables", "data.upkeep"),
    ),
)
