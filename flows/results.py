"""What each flow returns: a small record, printed as JSON or as a few lines."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel

from data.snapshot import Snapshot
from data.tables import TableResult


class Result(BaseModel):
    """A flow's outcome; `changed` is False when it found everything done, and then there may be no run."""

    run_id: str | None = None
    changed: bool = False

    @property
    def exit_code(self) -> int:
        """What a shell gets to see."""
        return 0

    def summary(self) -> str:
        """A few lines for a person."""
        raise NotImplementedError


class Ingested(Result):
    """A snapshot: where it is, what is in it and what was refused."""

    snapshot: str
    name: str
    fingerprint: str
    source: str
    geometry: tuple[int, int, int]
    decode: dict[str, Any]
    rows: int
    counts: dict[str, int]
    rejected: int
    reasons: dict[str, int]
    rejects: str | None
    duplicates: int
    leaked: int

    @classmethod
    def of(cls, snapshot: Snapshot) -> Self:
        """A snapshot's own record, less its files."""
        fields = {name: getattr(snapshot, name) for name in cls.model_fields if hasattr(snapshot, name)}
        return cls(
            **fields | {"decode": snapshot.decode.to_dict()},
            snapshot=snapshot.uri,
            geometry=snapshot.decode.geometry,
            rejects=snapshot.rejects_uri,
        )

    def summary(self) -> str:
        counts = ", ".join(f"{n:,} {split}" for split, n in self.counts.items())
        lines = [
            f"snapshot {self.snapshot}",
            f"  {self.rows:,} images ({counts}), {_geometry(self.geometry)}",
        ]
        lines.append(f"  {told(self)}, {_duplicates(self.duplicates)}")
        return _state(self) + "\n".join(lines)


class WarmStart(BaseModel):
    """The model that a training started from, its validation ELBO before the first step, and what it saved.

    images: how many it had seen when its own validation was as good; None where that is not known.
    """

    model: str
    elbo: float
    images: int | None

    def __str__(self) -> str:
        saved = "" if self.images is None else f", which had taken it {self.images:,} images"
        return f"started from {self.model} at a validation ELBO of {self.elbo:.2f}{saved}"


class Trained(Result):
    """A finished training: its job, the folder of the bundle, and how it went."""

    job: str
    bundle: Path
    snapshot: str
    fingerprint: str
    weights: str
    seconds: float
    images_per_second: float
    warm_start: WarmStart | None = None

    def summary(self) -> str:
        took = f"trained in {self.seconds:.0f} s, {self.images_per_second:,.0f} images/s"
        warm = f"\n  {self.warm_start}" if self.warm_start else ""
        return f"{_state(self)}model bundle {self.bundle}\n  {took}{warm}"


class Scores(Result):
    """What an evaluation found: each score with its standard error, and how it was made."""

    job: str
    model: str
    snapshot: str
    scores: dict[str, Any]
    protocol: dict[str, Any]

    @property
    def headline(self) -> str:
        """The score that models are compared by: the ELBO; an autoencoder has only its log-likelihood."""
        return "elbo" if "elbo" in self.scores else "log_likelihood"

    def scalars(self) -> dict[str, dict[str, Any]]:
        """The scores that are one number."""
        return {name: one for name, one in self.scores.items() if isinstance(one["value"], float | int)}

    def summary(self) -> str:
        title = f"{self.model} on {self.protocol['images']:,} {self.protocol['split']} images"
        return f"{_state(self)}{title}, likelihoods in nats an image\n{self.table()}"

    def table(self) -> str:
        """The scores, a line each."""
        return "\n".join(f"  {name:<20} {number(one)}" for name, one in self.scalars().items())


class Table(Result):
    """A complete table: where, how many rows, and what made it."""

    uri: str
    files: str
    rows: int
    rejected: int
    reasons: dict[str, int]
    duplicates: int | None = None
    rejects: str | None
    bytes: int
    seconds: float
    model: str

    @classmethod
    def of(cls, result: TableResult, seconds: float, model: str) -> Self:
        """A table from the store's own record of it."""
        fields = {name: value for name, value in asdict(result).items() if name in cls.model_fields}
        files = f"{result.uri}/{result.snapshot:06d}/part-*.parquet"
        return cls(**fields | {"files": files}, rejects=result.rejects_uri, seconds=seconds, model=model)

    def summary(self) -> str:
        lines = [f"{self.rows:,} rows in {self.uri}", f"  made by {self.model}"]
        equal = "" if self.duplicates is None else f", {_duplicates(self.duplicates)}"
        return _state(self) + "\n".join([*lines, f"  {told(self)}{equal}", self.read()])

    def read(self) -> str:
        """The lines that read it."""
        return f"  pandas.read_parquet({self.uri!r})\n  duckdb.sql(\"FROM '{self.files}'\")"


class Difference(BaseModel):
    """Challenger less champion on the same images: the mean in nats an image and its 95 % interval."""

    mean: float
    low: float
    high: float
    images: int

    def __str__(self) -> str:
        interval = f"95 % interval {self.low:.3f} to {self.high:.3f}"
        return f"{self.mean:+.3f} nats an image ({interval}, {self.images:,} images)"


class Found(Result):
    """Tables found: each as it is, less its lineage."""

    tables: list[dict[str, Any]]

    def summary(self) -> str:
        return "\n".join(_line(table) for table in self.tables) or "no tables"


class Shown(Result):
    """One table: what is in it, and what made it."""

    table: dict[str, Any]
    about: dict[str, Any]

    def summary(self) -> str:
        made = [f"{part} {json.dumps(self.about[part], indent=2)}" for part in ("lineage", "job", "versions")]
        return "\n".join([_line(self.table), *made])


class Verified(Result):
    """A table whose every file, page, record and count was found as it was committed."""

    uri: str
    snapshot: int
    rows: int
    files: int

    def summary(self) -> str:
        return f"{self.uri}: snapshot {self.snapshot} is intact, {self.rows:,} rows in {self.files:,} files"


class Files(Result):
    """Every file of a table's current snapshot, for any Parquet reader."""

    files: list[str]

    def summary(self) -> str:
        return "\n".join(self.files)


class Removed(Result):
    """What no manifest named, and is gone: paths in the table, and their bytes."""

    uri: str
    paths: list[str]
    bytes: int

    def summary(self) -> str:
        return "\n".join([*self.paths, f"{len(self.paths):,} files removed, {self.bytes:,} bytes"])


class Verdict(Result):
    """What the gate decided on a version, against which champion, and why in one line."""

    version: str
    champion: str
    promoted: bool
    reason: str
    margin: float = 0.0
    difference: Difference | None = None


class Moved(Result):
    """The champion alias moved by hand, or back; and the tables that followed it."""

    model_uri: str
    before: str
    reason: str
    tables: list[Table]

    def summary(self) -> str:
        instead = f" instead of version {self.before}" if self.before and self.changed else ""
        lines = [f"{_state(self)}{self.model_uri} is champion{instead}: {self.reason}"]
        return "\n".join([*lines, *(f"latents  {table.rows:,} rows in {table.uri}" for table in self.tables)])


class Followed(Result):
    """The tables that follow a champion; `tables` are those encoded now, since it changed."""

    champion: str
    sources: list[str]
    tables: list[Table]

    def summary(self) -> str:
        lines = [f"{_state(self)}{len(self.sources)} tables follow {self.champion or 'a champion to come'}"]
        lines += [f"  {source}" for source in self.sources]
        return "\n".join([*lines, *(f"latents  {table.rows:,} rows in {table.uri}" for table in self.tables)])


class ModelNode(BaseModel):
    """A registered version in the lineage: the run that made it, of which dataset."""

    uri: str
    aliases: list[str]
    run: str
    dataset: str
    weights: str


class TableNode(BaseModel):
    """A table in the lineage: what it was encoded from, with which model, of which training set."""

    uri: str
    kind: str
    rows: int
    source: str
    model: str
    weights: str
    dataset: str


class Traced(Result):
    """A thing's dataset, and every model and table made of it."""

    thing: str
    dataset: str
    models: list[ModelNode]
    tables: list[TableNode]

    def summary(self) -> str:
        lines = [f"dataset  {self.dataset}"]
        lines += [
            f"{table.kind:<8} {table.uri}, from {table.source}" for table in self.tables if not table.model
        ]
        for model in self.models:
            aliases = "".join(f" @{alias}" for alias in model.aliases)
            lines.append(f"model    {model.uri}{aliases}, by MLflow run {model.run}")
        for table in self.tables:
            if table.model:
                source = f" from {table.source}" if table.source else ""
                lines.append(f"{table.kind:<8} {table.uri}: {table.rows:,} rows by {table.model}{source}")
        return "\n".join(lines)


class Drifted(Result):
    """Whether new images differ from a model's own, why in one line, and the table of the tests."""

    job: str
    model: str
    reference: str
    new: str
    reference_rows: int
    new_rows: int
    drift: bool
    reason: str
    p: dict[str, float] = {}
    table: str | None = None

    def summary(self) -> str:
        found = "DRIFT" if self.drift else "no drift" if self.p else "not tested"
        title = f"{found}: {self.reason}"
        sides = f"  {self.new_rows:,} new images of {self.new}\n"
        sides += f"  {self.reference_rows:,} images of {self.reference}"
        table = [f"  pandas.read_parquet({self.table!r})"] if self.table else []
        return (_state(self) if self.p else "") + "\n".join([title, sides, *table])


class Served(Result):
    """The end of serving, or the file that the deployments were written to."""

    written: Path | None = None

    def summary(self) -> str:
        return f"deployments in {self.written}: prefect deploy --all" if self.written else "served until now"


class Bootstrapped(Result):
    """What a Prefect server has been set up with."""

    gpus: int
    automations: list[str]

    def summary(self) -> str:
        return "\n".join([f"limit gpu: {self.gpus}", *(f"automation {name}" for name in self.automations)])


class Reconciled(Result):
    """MLflow runs that were closed, with the status each got; tables encoded after a promotion, by model."""

    closed: dict[str, str]
    models: dict[str, int]

    def summary(self) -> str:
        runs = [f"MLflow run {run} is {status}" for run, status in self.closed.items()]
        models = [f"{name}: alias and history agree, {n} tables encoded" for name, n in self.models.items()]
        return _state(self) + "\n".join([*runs, *models])


class Cleaned(Result):
    """What was removed: paths of checkpoints and jobs under jobs/, tables, model versions."""

    checkpoints: list[str]
    tables: list[str]
    jobs: list[str]
    versions: list[str]

    def summary(self) -> str:
        parts = {"checkpoint": self.checkpoints, "table": self.tables, "job": self.jobs}
        gone = [f"{kind} {one}" for kind, names in parts.items() for one in names]
        return _state(self) + "\n".join([*gone, *(f"version {uri}" for uri in self.versions)])


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: whether it is fit, what was found, what to do."""

    name: str
    fit: bool
    found: str
    remedy: str = ""


class Diagnosis(Result):
    """What the doctor found."""

    findings: list[Finding]

    @property
    def exit_code(self) -> int:
        return 0 if all(finding.fit for finding in self.findings) else 1

    def summary(self) -> str:
        lines = []
        for one in self.findings:
            lines.append(f"{'ok  ' if one.fit else 'FAIL'} {one.name}: {one.found}")
            lines += [f"     -> {one.remedy}"] if one.remedy else []
        return "\n".join(lines)


class Pulled(Result):
    """A bundle fetched from the registry."""

    model: str
    bundle: Path

    def summary(self) -> str:
        return f"{self.model} is in {self.bundle}\n  vae.load({str(self.bundle)!r})"


class Signed(Result):
    """A version whose signature is in the registry."""

    model: str

    def summary(self) -> str:
        return f"{self.model} is signed"


class Exported(Result):
    """Graphs of a model, and how far each is from it: the largest |a - b| / (1 + |b|)."""

    model: str
    directory: Path
    deviations: dict[str, float]

    def summary(self) -> str:
        lines = [f"  {file:<13} off by {worst:.1e} at most" for file, worst in self.deviations.items()]
        return "\n".join([f"{self.model} is in {self.directory}", *lines])


class Drawn(Result):
    """A picture made with a model, and on request the table of what it shows."""

    model: str
    picture: Path
    images: int
    notes: list[str]
    table: str | None = None

    def summary(self) -> str:
        table = [f"  latents and images in {self.table}"] if self.table else []
        return "\n".join([f"{self.images} images of {self.model} in {self.picture}", *table, *self.notes])


class Browsed(Result):
    """Rows of a table: their scalar columns, `distance` where they are neighbours, and a thumbnail's path."""

    table: str
    rows: list[dict[str, Any]]
    picture: str | None = None

    def summary(self) -> str:
        names = list(self.rows[0]) if self.rows else []
        cells = [names, *([_cell(row[name]) for name in names] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        return "\n".join([*lines, *([f"picture {self.picture}"] if self.picture else [])])


class Reported(Result):
    """A model's report: the page, its size in bytes, and its figures beside it."""

    model: str
    page: str
    figures: list[str]
    bytes: int

    def summary(self) -> str:
        size = f"{self.bytes / 1e6:.1f} MB, and {len(self.figures)} figures as PNGs"
        return f"{_state(self)}report of {self.model}: {self.page}\n  {size}"


class Retrained(Result):
    """Everything a retrain leaves behind; changed where any part of it is."""

    model_name: str
    version: str
    model_uri: str
    champion_uri: str
    verdict: Verdict
    ingested: Ingested
    trained: Trained
    scores: Scores
    latents: Table | None
    followed: list[Table]
    samples: Table | None
    report: Reported

    def model_post_init(self, context: Any) -> None:
        parts = (
            self.ingested,
            self.trained,
            self.scores,
            self.verdict,
            self.latents,
            self.samples,
            self.report,
        )
        self.changed = any(part.changed for part in (*parts, *self.followed) if part)

    def summary(self) -> str:
        verdict = "is champion" if self.verdict.promoted else "stays challenger"
        lines = [
            f"{_state(self)}{self.model_uri} {verdict}: {self.verdict.reason}",
            f"scores on {self.scores.protocol['images']:,} test images, likelihoods in nats an image",
            self.scores.table(),
            f"images   {self.ingested.rows:,}, {told(self.ingested)}",
        ]
        for name, table in (("latents", self.latents), ("samples", self.samples)):
            if table is not None:
                lines.append(f"{name}  {table.rows:,} rows of {table.model} in {table.uri}\n{table.read()}")
        lines.append(f"report   {self.report.page}")
        return "\n".join([*lines, f"MLflow   run {self.run_id}" if self.run_id else "MLflow   no new run"])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def told(result: Ingested | Table) -> str:
    """How many were rejected, why, and where they are listed."""
    if not result.rejected:
        return "0 rejected"
    reasons = ", ".join(f"{n} {reason}" for reason, n in result.reasons.items())
    return f"{result.rejected:,} rejected ({reasons}; see {result.rejects})"


def _line(table: dict[str, Any]) -> str:
    """A table in one line."""
    state = "" if table["snapshot"] else ", none complete yet"
    state = ", a newer snapshot is unfinished" if table["snapshot"] and table["unfinished"] else state
    equal = "" if table["duplicates"] is None else f", {_duplicates(table['duplicates'])}"
    size = f"{table['rows']:,} rows, {table['rejected']:,} rejected{equal}, {table['bytes']:,} bytes"
    return f"{table['uri']}: {table['kind']}, snapshot {table['snapshot']}, {size}{state}"


def _state(result: Result) -> str:
    return "" if result.changed else "nothing to do: all of this was there already\n"


def _duplicates(count: int) -> str:
    return f"{count:,} duplicate{'' if count == 1 else 's'}"


def _geometry(geometry: tuple[int, int, int]) -> str:
    channels, height, width = geometry
    return f"{height} x {width} pixels, {'grey' if channels == 1 else 'RGB'}"


def number(score: dict[str, Any]) -> str:
    """A score with its standard error."""
    error = "" if score["stderr"] is None else f" +- {score['stderr']:.4g}"
    return f"{score['value']:.6g}{error}"
