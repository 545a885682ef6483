"""Pull: a model's bundle from the registry to a folder, its digests checked, nothing of it executed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from flows.config import Pull
from flows.registry import locate
from flows.results import Pulled


def pull(config: Pull) -> Pulled:
    """Copy the bundle whole: the folder appears when everything in it is right."""
    from vae.bundle import from_files

    refuse_existing(config.directory)
    found = locate(config.model)
    files = found.files()
    from_files(files)
    write_folder(config.directory, files)
    return Pulled(model=found.uri, bundle=config.directory, changed=True)


def refuse_existing(directory: Path) -> None:
    """A folder is written once, whole."""
    if directory.exists():
        raise ValueError(f"{str(directory)!r} exists already: give a new folder")


def write_folder(directory: Path, files: Mapping[str, bytes]) -> None:
    """Files by name, in a folder that appears with all of them."""
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, content in files.items():
        (partial / name).write_bytes(content)
    partial.replace(directory)
