"""Pull: a model's bundle from the registry to a folder, its digests checked, nothing of it executed."""

from __future__ import annotations

import shutil

from flows.config import Pull
from flows.registry import locate
from flows.results import Pulled


def pull(config: Pull) -> Pulled:
    """Copy the bundle whole: the folder appears when everything in it is right."""
    from vae.bundle import from_files

    if config.directory.exists():
        raise ValueError(f"{str(config.directory)!r} exists already: give a new folder")
    found = locate(config.model)
    files = found.files()
    from_files(files)
    partial = config.directory.with_name(f".{config.directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, content in files.items():
        (partial / name).write_bytes(content)
    partial.replace(config.directory)
    return Pulled(model=found.uri, bundle=config.directory, changed=True)
