"""System calls that kill or fail: `strace` injects at the n-th such call of a forked process."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.store import open_store
from tests.faults.trials import (
    NOTHING,
    Child,
    Ended,
    Experiment,
    Found,
    counted,
    found_in_child,
    in_child,
    unless,
)

# What the commit and checkpoint code does to a file, and what becomes of it.
KILLS = [f"{call}:signal=KILL" for call in ("fsync", "write", "link", "unlink", "mkdir", "openat")]
FAILURES = [
    "write:error=ENOSPC",  # from then on: a disk stays full
    "fsync:error=EIO",
    "link:error=EIO",
    "openat:error=EACCES",
    "mkdir:error=EACCES",
]
MOST = 400  # calls of a kind that a body makes, at most


def injected(body: Callable[[], Any], fault: str, when: int, log: Path) -> Ended:
    """Run `body` in a child whose `when`-th call is injected with the fault; a failure stays."""
    ready, go = os.pipe()

    def held() -> Any:
        os.read(ready, 1)
        return body()

    child = Child(held, log)
    place = f"when={when}" if "signal" in fault else f"when={when}+"
    line = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"inject={fault}:{place}", "-p", str(child.pid)]
    strace = subprocess.Popen(line)
    while "TracerPid:\t0" in Path(f"/proc/{child.pid}/status").read_text():
        assert strace.poll() is None, "strace could not attach"
    os.write(go, b"1")
    ended = child.wait()
    strace.wait()
    os.close(ready)
    os.close(go)
    return ended


def lacks_strace() -> str:
    return "" if shutil.which("strace") else "strace is not installed"


# -- what is stopped


def commit_table(folder: Path, root: Path) -> None:
    from tests.test_tables import run

    run(folder, root, share=0.2)


def commit_snapshot(folder: Path, root: Path) -> None:
    from data.images import DecodePath
    from data.snapshot import ingest
    from data.sources import open_source

    source = open_source(f"folder:{folder}")
    ingest(source, DecodePath(8, 8, 3), open_store(root), max_reject_share=0.2)


def commit_checkpoints(folder: Path, root: Path) -> None:
    """Three, of which the oldest is removed."""
    from flows.fitting import save_checkpoint
    from vae import checkpoint

    for step in (1, 2, 3):
        save_checkpoint(open_store(root), step, checkpoint.pack({}, {"step": step}))


# -- what must hold afterwards


def table_is_whole(folder: Path, root: Path) -> Found:
    import pyarrow.parquet as pq

    from data.tables import open_table, read_latents
    from data.upkeep import verify

    for part in root.rglob("part-*.parquet"):
        pq.read_table(part, page_checksum_verification=True)  # what has its name is whole
    (table,) = root.iterdir()
    assert open_table(str(table)).rows
    verify(str(table))
    wanted = sorted(path.name for path in folder.iterdir() if path.stat().st_size > 20)
    return counted(read_latents(str(table))[0].tolist(), wanted)


def snapshot_is_whole(folder: Path, root: Path) -> Found:
    from data.snapshot import open_snapshot, resident

    (snapshot,) = root.iterdir()
    wanted = sorted(path.name for path in folder.iterdir() if path.stat().st_size > 20)
    return counted(resident(open_snapshot(str(snapshot))).ids, wanted)


def checkpoints_are_whole(folder: Path, root: Path) -> Found:
    from flows.fitting import read_checkpoints
    from vae import checkpoint

    steps = [checkpoint.unpack(blob)[1]["step"] for blob in read_checkpoints(open_store(root))]
    return unless(steps == [3, 2], f"checkpoints of steps {steps}")


BODIES = {
    "checkpoint": (commit_checkpoints, checkpoints_are_whole),
    "append": (commit_table, table_is_whole),
    "table": (commit_table, table_is_whole),
    "snapshot": (commit_snapshot, snapshot_is_whole),
}


def prepare(shared: Path) -> None:
    """Twelve images, one of them empty; the same with two more and one less, and a table of the first."""
    from tests.test_tables import folder_of

    for name in BODIES:
        folder_of(shared / name, range(12))
    commit_table(shared / "append", shared / "seed")
    folder_of(shared / "append", range(12, 14))
    (shared / "append/0011.png").unlink()
    for name in BODIES:
        (shared / name / "0003.png").write_bytes(b"")


def every_call(faults: list[str]) -> Callable[[int, Path, Path], Found]:
    """A batch: of one body and one call, each occurrence in turn until one run meets it no more."""
    combinations = list(itertools.product(BODIES, faults))

    def batch(seed: int, folder: Path, shared: Path) -> Found:
        name, fault = combinations[seed % len(combinations)]
        found = NOTHING
        for when in range(1, MOST):
            one, met = stopped(name, fault, when, folder, shared)
            found += one
            if not met or one.bad:
                return found
        raise AssertionError(f"{name} makes {MOST} calls of {fault} and more")

    return batch


def stopped(name: str, fault: str, when: int, folder: Path, shared: Path) -> tuple[Found, bool]:
    """Stop a body at one call, run it again, look; and whether there was such a call."""
    images, root, (body, whole) = shared / name, folder / f"{when}", BODIES[name]
    if name == "append":
        shutil.copytree(shared / "seed", root)
    ended = injected(lambda: body(images, root), fault, when, folder / "log")
    met = ended.code != 0
    place = "/" if fault.startswith("openat") else str(root)  # what is read may be refused as well
    if met and "error" in fault and place not in str(ended.value):
        return Found(broken=1, note=f"{name} {fault} {when}: no path in {ended.value}"), True
    if met:
        in_child(lambda: body(images, root), folder / "log").given()
    found = found_in_child(lambda: whole(images, root), folder / "log")
    return replace(found, trials=int(met), note=found.note and f"{name} {fault} {when}: {found.note}"), met


IMPORTS = (
    *("tests.test_tables", "data.snapshot", "data.upkeep", "flows.fitting", "vae.checkpoint"),
    # Whose files must not be refused instead of ours.
    *("numpy.ctypeslib", "safetensors.torch", "cv2", "PIL.PngImagePlugin"),
)
EXPERIMENTS = (
    Experiment(
        "SIGKILL at a system call",
        "A commit or a checkpoint that is killed at any open, mkdir, write, fsync, link or unlink is made "
        "whole by the same command, once.",
        goal=400,
        batch=every_call(KILLS),
        prepare=prepare,
        lacks=lacks_strace,
        imports=IMPORTS,
    ),
    Experiment(
        "disk full, refused or failing at a system call",
        "One error that names the path; the old state intact; the same command ends well afterwards.",
        goal=300,
        batch=every_call(FAILURES),
        prepare=prepare,
        lacks=lacks_strace,
        imports=IMPORTS,
    ),
)
