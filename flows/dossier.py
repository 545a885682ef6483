"""What is on record of a model: its scores and its rival's, the verdict, its images, training and run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.snapshot import open_snapshot
from data.sources import unescape
from data.store import open_store
from flows import promotion, registry
from flows.config import Evaluate, Report, narrow
from flows.evaluate import evaluate
from flows.jobs import digest, job_store, read_record
from flows.lineage import known_tables
from flows.promotion import Move
from flows.registry import Located
from flows.results import Ingested, Scores, Verdict
from flows.tracking import Recorded, recorded
from flows.watch import read_history


@dataclass(frozen=True)
class Dossier:
    """Everything that a report says without looking at a single image."""

    root: Path
    model: Located
    facts: dict[str, Any]
    ingested: Ingested
    scores: Scores
    verdict: Verdict | None
    rival: Scores | None
    rival_name: str
    moves: list[Move]
    home: str  # the folder of its job
    history: dict[str, Any]
    run: Recorded | None

    @property
    def identity(self) -> list[Any]:
        """What the report depends on, beside its settings and the program; who is champion now is not."""
        parts = [self.facts["weights"], self.ingested.fingerprint, self.scores.job, self.model.uri]
        return [*parts, self.verdict and self.verdict.model_dump(), self.rival and self.rival.job]

    @property
    def title(self) -> str:
        """The model's name and version; of a bundle, its folder."""
        return f"{self.model.name}, version {self.model.version}" if self.model.name else self.model.uri

    @property
    def score_name(self) -> str:
        """What an image's score is called."""
        return "ELBO" if self.scores.headline == "elbo" else "log-likelihood"

    @property
    def config_toml(self) -> str:
        """The settings of the run that made the model, as `--config` reads them; '' where none are kept."""
        return self.run.config if self.run else ""

    def path(self, id: str) -> str:
        """The file of an image's id, where it is one on this machine; else ''."""
        kind, _, place = self.ingested.source.partition(":")
        file = Path(place) / os.fsdecode(unescape(id))
        return str(file) if kind == "folder" and file.is_file() else ""


def open_dossier(config: Report) -> Dossier:
    """Gather it; the scores of the model and of its rival are computed where they are not there yet."""
    model = registry.locate(config.model)
    facts = model.facts()
    snapshot = config.source or f"snapshot:{own_snapshot(config.root, facts['extra']['dataset'], model.uri)}"
    scores = evaluate(narrow(Evaluate, config, model=model.uri, source=snapshot))
    verdict = read_verdict(config.root, model)
    rival = rival_of(model, verdict)
    home = home_of(config.root, model, facts["weights"])
    return Dossier(
        root=config.root,
        model=model,
        facts=facts,
        ingested=Ingested.of(open_snapshot(scores.snapshot)),
        scores=scores,
        verdict=verdict,
        rival=evaluate(narrow(Evaluate, config, model=rival, source=snapshot)) if rival else None,
        rival_name=f"version {rival.rsplit('/', 1)[1]}" if rival else "",
        moves=promotion.history(config.root, model.name) if model.name else [],
        home=home,
        history=read_history(job_store(config.root, home)),
        run=recorded(registry.run_of(model.name, model.version)) if model.name else None,
    )


def home_of(root: Path, model: Located, weights: str) -> str:
    """The job that trained a model, where it is known; else one of its reports' own."""
    tags = registry.tags(model.name, model.version) if model.name else {}
    folder = model.folder.resolve()
    if folder == root.resolve() / "jobs" / folder.parent.name / "bundle":
        return folder.parent.name
    return tags.get(registry.JOB_TAG) or f"report-{digest(weights)}"


def own_snapshot(root: Path, fingerprint: str, model: str) -> str:
    """The snapshot that a model was trained on; ValueError where it is not known here."""
    for table in known_tables(root):
        if table.about["job"].get("fingerprint") == fingerprint:
            return table.uri
    raise ValueError(
        f"no snapshot {fingerprint}, which {model} was trained on, under root {str(root)!r}: give --source"
    )


def read_verdict(root: Path, model: Located) -> Verdict | None:
    """What the gate decided on a version; None for a bundle, or a version that no gate has judged."""
    if not model.name:
        return None
    store = open_store(root.resolve() / "registry" / model.name / "gates")
    record = read_record(store, f"{model.version}.json")
    return Verdict(**record) if record else None


def rival_of(model: Located, verdict: Verdict | None) -> str | None:
    """The champion to compare with: the one the gate compared with, or without a verdict who is it now."""
    if not model.name:
        return None
    version = verdict.champion if verdict else registry.champion(model.name)
    if not version or version == model.version or not registry.exists(model.name, version):
        return None
    return f"models:/{model.name}/{version}"
