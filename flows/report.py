"""Report: what a model has learned, as one HTML page that needs nothing else, and its figures as PNGs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from data.batches import Resident
from data.snapshot import open_snapshot, resident
from data.store import Store
from flows import charts, figures, registry
from flows.artifacts import publish
from flows.card import card
from flows.config import Report
from flows.devices import pick_device
from flows.dossier import Dossier, open_dossier
from flows.facts import per_image
from flows.jobs import digest, job_store, put_record, read_record
from flows.page import ASSETS, Page, Shown
from flows.portrait import FITTED, OWN, Sitter, projections
from flows.progress import progress
from flows.results import Reported
from flows.tracking import Run, tracked

logger = logging.getLogger("vae_flows.report")
RESIDENT = 2**30  # bytes of training images up to which they are read; above, the shown images serve
PAGE = "report.html"


@flow(name="report")
def report(config: Report) -> Reported:
    """The page of a model: found where it is drawn, else drawn; logged, and linked from Prefect."""
    with tracked(config) as run:
        run.drain()  # the page shows the run's metrics
        dossier = open_dossier(config)
        program = [(ASSETS / name).read_text() for name in ("report.html", "report.css", "report.js")]
        # Asked for by itself, the page is to say who is champion today; a retrain's own stays as it was.
        today = [vars(move) for move in dossier.moves] if run.command == "report" else []
        key = digest(dossier.identity, today, config.points, config.seed, program, projections())
        store = job_store(config.root, dossier.home, "reports", key)
        if (record := read_record(store, "report.json")) is not None:
            logger.info("report: unchanged, %s is drawn", dossier.model.uri)
            reported = Reported(**record)
        else:
            reported = draw(config, dossier, store)
        if run.wants(reported):
            _log(run, store, dossier, reported)
            publish(dossier, reported)
        if config.out is not None:
            config.out.parent.mkdir(parents=True, exist_ok=True)
            config.out.write_bytes(store.get(PAGE))
            reported = reported.model_copy(update={"page": str(config.out)})
        return run.sign(reported)


@task(cache_policy=NO_CACHE)
def draw(config: Report, dossier: Dossier, store: Store) -> Reported:
    """Have the model sit, draw page and figures, commit them, then the record that says so."""
    logger.info("report: drawing %s", dossier.model.uri)
    sitter = sit(config, dossier)
    shown = look(config, dossier, sitter)
    page = Page(dossier, sitter, shown).html().encode()
    store.put_if_absent(PAGE, page)
    names = []
    for name, png in pictures(sitter, shown).items():
        store.put_if_absent(f"figures/{name}.png", png)
        names.append(f"figures/{name}.png")
    record = Reported(model=dossier.model.uri, page=store.uri(PAGE), figures=names, bytes=len(page))
    put_record(store, "report.json", record.model_dump(exclude={"run_id", "changed"}))
    logger.info("report: %s, %.1f MB", record.page, len(page) / 1e6)
    return record.model_copy(update={"changed": True})


def sit(config: Report, dossier: Dossier) -> Sitter:
    """The model with the images that it was scored on, and training images for statistics."""
    import vae

    snapshot = open_snapshot(dossier.scores.snapshot)
    shown = resident(snapshot, dossier.scores.protocol["split"])
    found = per_image(dossier, dossier.scores)
    score = dict(zip(found["id"].tolist(), found[dossier.scores.headline].tolist(), strict=True))
    train = snapshot.counts.get("train", 0)
    fits = 0 < train * math.prod(snapshot.decode.geometry) <= RESIDENT
    model = vae.load(dossier.model.folder).to(pick_device(config.device))
    scores = np.array([score[id] for id in shown.ids])
    return Sitter(model, shown, scores, some(resident(snapshot, "train") if fits else shown), config.seed)


def some(images: Resident) -> Resident:
    """At most as many images as statistics need, drawn at random, always the same."""
    if len(images.ids) <= FITTED:
        return images
    rows = np.sort(np.random.default_rng(0).permutation(len(images.ids))[:FITTED])
    return Resident(images.images[rows], [images.ids[r] for r in rows], [images.labels[r] for r in rows])


def look(config: Report, dossier: Dossier, sitter: Sitter) -> Shown:
    """Everything that the page shows, part by part, which for a large model takes a while."""
    kl = dossier.scores.scores.get("kl_per_dim")
    rival = per_image(dossier, dossier.rival).get(dossier.scores.headline) if dossier.rival else None
    parts: dict[str, Callable[[], Any]] = {
        "pairs": sitter.pairs,
        "samples": sitter.samples,
        "interpolations": sitter.interpolations,
        "edits": sitter.edits,
        "traversals": lambda: sitter.traversals(kl["value"] if kl else None),
        "map": lambda: sitter.map(config.points),
        "charts": lambda: charts.training_charts(dossier.history),
        "scores": lambda: charts.score_chart(dossier.score_name, sitter.scores, rival, dossier.rival_name),
    }
    found = {}
    with progress("report") as advance:
        for done, (name, draw_part) in enumerate(parts.items()):
            advance(done, len(parts), name)
            found[name] = draw_part()
        advance(len(parts), len(parts), "parts")
    return Shown(**found)


def pictures(sitter: Sitter, shown: Shown) -> dict[str, bytes]:
    """The page's figures as PNGs, by name."""
    drawn = {chart.name: charts.png(chart) for chart in (*shown.charts, shown.scores)}
    for pairs in shown.pairs:
        both = np.concatenate([pairs.images, pairs.reconstructions])
        drawn[f"reconstructions-{pairs.title.lower()}"] = figures.grid(both, columns=len(pairs.images))
    for samples in shown.samples:
        drawn[f"samples-{samples.name}"] = figures.grid(samples.sheets[OWN])
    for name, films in (("interpolations", shown.interpolations), ("edits", shown.edits)):
        if films:
            drawn[name] = figures.grid(np.concatenate([film.frames for film in films]), len(films[0].frames))
    if shown.traversals:
        rows = np.concatenate([one.frames for one in shown.traversals])
        drawn["traversals"] = figures.grid(rows, len(shown.traversals[0].frames))
    labels = [sitter.shown.labels[place] for place in shown.map.places]
    return drawn | {f"map-{n.lower()}": charts.map_png(xy, labels, n) for n, xy in shown.map.points.items()}


def _log(run: Run, store: Store, dossier: Dossier, reported: Reported) -> None:
    """Page and figures to the run, the card to the registry."""
    if dossier.model.name:
        registry.describe(dossier.model.name, dossier.model.version, card(dossier))
    run.log_bytes(PAGE, store.get(PAGE))
    for name in reported.figures:
        run.log_bytes(name, store.get(name))
