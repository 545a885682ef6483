"""What Prefect's page shows of a report: a summary with links, tables of scores and rejects."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from flows import facts
from flows.card import card
from flows.dossier import Dossier
from flows.lineage import known_tables
from flows.results import Reported


def publish(dossier: Dossier, reported: Reported) -> None:
    """Create the artifacts of this run; a later report of the same version continues them."""
    from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
    from prefect.runtime import flow_run

    if not flow_run.id:
        return
    key = key_of(dossier)
    links = "\n".join(f"- {link}" for link in links_of(dossier, reported))
    create_markdown_artifact(f"{card(dossier)}\n\n## See\n\n{links}", key=f"model-{key}")
    create_link_artifact(url(reported.page), link_text=f"Report of {dossier.title}", key=f"report-{key}")
    names = ("name", "unit", "own", "rival", "difference")
    scores = [{name: row[name] or "" for name in names} for row in facts.rows(dossier)]
    create_table_artifact(scores, key=f"scores-{key}", description=f"Scores of {dossier.title}")
    rejects = [{"reason": reason, "images": count} for reason, count in dossier.ingested.reasons.items()]
    told = f"{dossier.ingested.rejected:,} rejected; {dossier.ingested.rejects or 'no reject table'}"
    create_table_artifact(rejects, key=f"rejects-{key}", description=told)


def key_of(dossier: Dossier) -> str:
    """A model's name and version as Prefect takes a key: small letters, digits and dashes."""
    name = f"{dossier.model.name}-{dossier.model.version}" if dossier.model.name else dossier.home
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def links_of(dossier: Dossier, reported: Reported) -> Iterator[str]:
    """The report, the MLflow run, the snapshot, and every table that this model made."""
    yield f"[report]({url(reported.page)})"
    if dossier.run:
        told = f"MLflow run {dossier.run.id}"
        yield f"[{told}]({dossier.run.url})" if dossier.run.url else told
    yield f"[snapshot]({url(dossier.ingested.snapshot)}): {dossier.ingested.rows:,} images"
    for table in known_tables(dossier.root):
        if table.rows and table.about["job"].get("weights_sha256") == dossier.facts["weights"]:
            yield f"[{table.kind}]({url(table.uri)}): {table.rows:,} rows"


def url(place: str) -> str:
    """A path as a URL; a URL as it is.

    >>> url("/tmp/a b"), url("s3://bucket/table")
    ('file:///tmp/a%20b', 's3://bucket/table')
    """
    return Path(place).as_uri() if place.startswith("/") else place
