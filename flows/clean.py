"""Clean: what has served and is of no more use. What can be rolled back to stays, latents included.

Of each model the newest versions stay, the last champions, and whatever carries an alias. The others go with
their tables and the folder of their training; `mlflow gc` then frees the artifacts that MLflow keeps.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.store import open_store
from data.upkeep import drop, list_tables
from flows import promotion, registry
from flows.config import Clean
from flows.results import Cleaned
from flows.tracking import client

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger("vae_flows.clean")
Versions = dict[str, list["ModelVersion"]]


@dataclass(frozen=True)
class Doomed:
    """What goes, in the order in which it goes: killed on the way, the same command does the rest."""

    checkpoints: list[str]
    tables: list[str]
    jobs: list[str]
    versions: list[str]

    def told(self) -> dict[str, list[str]]:
        """The same as JSON has it."""
        return dict(vars(self))


def clean(config: Clean) -> Cleaned:
    """Remove it."""
    doomed, jobs = plan(config), open_store(config.root.resolve() / "jobs")
    for path in doomed.checkpoints:
        jobs.delete(path)
    for table in doomed.tables:
        drop(table)
    for job in doomed.jobs:
        # Its record goes first: half a job is none, and its bundle would be made anew.
        for entry in sorted(jobs.entries(job), key=lambda entry: not entry.path.endswith("trained.json")):
            jobs.delete(entry.path)
    for uri in doomed.versions:
        name, _, version = registry.parse(uri)
        client().delete_model_version(name, version)
    told = doomed.told()
    for kind, names in told.items():
        for one in names:
            logger.info("clean: %s %s", kind, one)
    return Cleaned.model_validate(told | {"changed": any(told.values())})


def plan(config: Clean) -> Doomed:
    """What `clean` would remove."""
    known = registered()
    kept = {name: keep(config, name, versions) for name, versions in known.items()}
    old = [v for name, versions in known.items() for v in versions if str(v.version) not in kept[name]]
    staying = {v.tags[registry.JOB_TAG] for vs in known.values() for v in vs if v not in old}
    return Doomed(
        checkpoints=list(checkpoints(config.root)),
        tables=list(tables(config.root, kept)),
        jobs=sorted({v.tags[registry.JOB_TAG] for v in old} - staying),
        versions=[f"models:/{v.name}/{v.version}" for v in old],
    )


def registered() -> Versions:
    """The versions that trainings of ours registered, by model, oldest first."""
    found: Versions = defaultdict(list)
    for model in client().search_registered_models():
        for version in client().search_model_versions(f"name = '{model.name}'"):
            if registry.JOB_TAG in version.tags:
                found[model.name].append(version)
    return {name: sorted(versions, key=lambda v: int(v.version)) for name, versions in found.items()}


def keep(config: Clean, name: str, versions: list[ModelVersion]) -> set[str]:
    """The versions that stay: the newest, the last champions, and those that an alias names."""
    newest = [str(version.version) for version in versions[-config.keep :]]
    aliases = [str(version) for version in client().get_registered_model(name).aliases.values()]
    champions = promotion.reigns(promotion.history(config.root, name))
    return {*newest, *aliases, *champions[-config.keep :]}


def checkpoints(root: Path) -> Iterator[str]:
    """Checkpoints that a kill left behind a finished job: nobody resumes from them."""
    jobs = open_store(root.resolve() / "jobs")
    for job in jobs.folders():
        if jobs.exists(f"{job}/trained.json"):
            yield from (entry.path for entry in jobs.entries(f"{job}/checkpoints"))


def tables(root: Path, kept: dict[str, set[str]]) -> Iterator[str]:
    """Tables under the root of models of ours whose version does not stay."""
    for kind in ("latents", "samples"):
        folder = root.resolve() / kind
        for table in list_tables(str(folder)) if folder.exists() else []:
            uri = str(table.about["lineage"].get("model", ""))
            if uri.startswith("models:/"):
                name, _, version = registry.parse(uri)
                if name in kept and version not in kept[name]:
                    yield table.uri
