"""Lineage, both ways: what a table, a model or a dataset was made of, and what was made of it.

Everything is read where it is true: a table's own metadata, a version's tags in the registry.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.store import open_store, seal, unseal
from data.upkeep import TableInfo, list_tables, show
from flows import registry
from flows.config import Lineage
from flows.jobs import digest
from flows.results import ModelNode, TableNode, Traced
from flows.tracking import client

SNAPSHOT = "snapshot"


def lineage(config: Lineage) -> Traced:
    """The dataset behind a thing, and every model and table made of that dataset."""
    tables = [info for info in known_tables(config.root) if info.rows]
    dataset, model = trace(config.thing, tables)
    nodes = [_table(info) for info in tables]
    snapshots = {f"snapshot:{node.uri}" for node in nodes if (node.kind, node.dataset) == (SNAPSHOT, dataset)}

    def belongs(node: TableNode) -> bool:
        if model and node.kind != SNAPSHOT:
            return node.weights == model
        return node.dataset == dataset or node.source in snapshots

    return Traced(
        changed=True,
        thing=config.thing,
        dataset=dataset,
        models=[node for node in _models() if node.dataset == dataset and model in ("", node.weights)],
        tables=[node for node in nodes if belongs(node)],
    )


def check(config: Lineage) -> None:
    """Refuse a thing that nothing is known of."""
    trace(config.thing, known_tables(config.root))


def trace(thing: str, tables: list[TableInfo]) -> tuple[str, str]:
    """A thing's dataset, and the digest of its model's weights where it is of one model."""
    if thing.startswith("models:/") or (Path(thing) / "manifest.json").is_file():
        facts = registry.locate(thing).facts()
        return facts["extra"]["dataset"], facts["weights"]
    fingerprints = {_table(info).dataset for info in tables} | {node.dataset for node in _models()}
    if thing in fingerprints:
        return thing, ""
    try:
        node = _table(show(thing.removeprefix("snapshot:")))
    except ValueError as error:
        raise ValueError(
            f"{thing!r} is no table, no snapshot, no model (models:/NAME@ALIAS or a bundle's folder) "
            f"and no dataset's fingerprint known here: see `vae-flows tables list`"
        ) from error
    return node.dataset, node.weights


def known_tables(root: Path) -> list[TableInfo]:
    """The tables under a root, and those that its flows wrote elsewhere."""
    root = root.resolve()
    here = {info.uri: info for kind in ("snapshots", "latents", "samples") for info in _listed(root / kind)}
    return list((here | {info.uri: info for info in _elsewhere(root) if info.uri not in here}).values())


def remember_table(root: Path, uri: str) -> None:
    """Keep in mind that this root's flows wrote a table, wherever it is."""
    open_store(root.resolve() / "jobs" / "tables").put_if_absent(f"{digest(uri)}.json", seal({"uri": uri}))


def _listed(folder: Path) -> list[TableInfo]:
    return list_tables(str(folder)) if folder.is_dir() else []


def _elsewhere(root: Path) -> Iterator[TableInfo]:
    store = open_store(root / "jobs" / "tables")
    for entry in sorted(store.entries()):
        uri = unseal(store.get(entry.path), store.uri(entry.path))["uri"]
        try:
            yield show(uri)
        except ValueError:  # removed since
            continue


def _models() -> list[ModelNode]:
    """Every registered version that our flows made."""
    found = client().search_model_versions()
    aliases = {model.name: model.aliases for model in client().search_registered_models()}
    return [
        ModelNode(
            uri=f"models:/{version.name}/{version.version}",
            aliases=[a for a, v in aliases.get(version.name, {}).items() if str(v) == str(version.version)],
            run=version.run_id or "",
            dataset=version.tags["dataset_digest"],
            weights=version.tags["weights_sha256"],
        )
        for version in sorted(found, key=lambda version: (version.name, int(version.version)))
        if "weights_sha256" in version.tags
    ]


def _table(info: TableInfo) -> TableNode:
    job: dict[str, Any] = info.about["job"]
    made: dict[str, Any] = info.about["lineage"]
    return TableNode(
        uri=info.uri,
        kind=info.kind,
        rows=info.rows,
        source=job.get("source", made.get("source", "")),
        model=made.get("model", ""),
        weights=job.get("weights_sha256", ""),
        dataset=job.get("fingerprint", made.get("dataset", "")),
    )
