"""What has been done, as records in the store under the root: a job's key, its folder, its lock.

A job is named by what determines its outcome. Its record, put if absent at the end, is the truth about it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.store import Store, open_store, seal, unseal

if TYPE_CHECKING:
    from filelock import FileLock


def digest(*parts: Any) -> str:
    """16 hex digits that name JSON-serialisable parts, the same in every process.

    >>> digest("train", {"a": 1, "b": 2}) == digest("train", {"b": 2, "a": 1})
    True
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def job_store(root: Path, *parts: str) -> Store:
    """The store of a job's records under the root."""
    return open_store(root.resolve() / "/".join(("jobs", *parts)))


def read_record(store: Store, name: str) -> dict[str, Any] | None:
    """A job's record, its digest checked, or None while the job isn't done."""
    return unseal(store.get(name), store.uri(name)) if store.exists(name) else None


def put_record(store: Store, name: str, body: dict[str, Any]) -> dict[str, Any]:
    """Commit a record; where another process was first, theirs counts."""
    store.put_if_absent(name, seal(body))
    return unseal(store.get(name), store.uri(name))


def try_lock(root: Path, name: str) -> FileLock | None:
    """The lock, for this process to hold as long as it lives; None if another has it."""
    from filelock import FileLock, Timeout

    folder = root.resolve() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(folder / f"{name}.lock", thread_local=False)
        held.acquire(timeout=0)
    except Timeout:
        return None
    return held


@contextmanager
def lock(root: Path, name: str) -> Iterator[None]:
    """One process at a time; the operating system frees the lock of a process that was killed."""
    from filelock import FileLock

    folder = root.resolve() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        yield
