"""Every flow's configuration: one frozen, typed record for the command line, TOML and Prefect alike.

Settings of models and training are those of `vae.config`, those of decoding are `data.images.DecodePath`:
taken over here, never written a second time. A model's geometry is not a setting: the images have it.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

import vae.config
from data.images import DecodePath
from data.secrets import has_credentials, redact
from flows.presets import PRESETS

GEOMETRY = ("height", "width", "channels")


def default_root() -> Path:
    """VAE_FLOWS_ROOT, else ./workspace."""
    return Path(os.environ.get("VAE_FLOWS_ROOT") or "workspace")


def refuse_unknown(values: Mapping[str, Any], valid: list[str], where: str) -> None:
    """Refuse a misspelt field, naming the nearest.

    >>> refuse_unknown({"epoch": 3}, ["epochs", "seed"], "training")
    Traceback (most recent call last):
    ValueError: unknown field 'epoch' in training: did you mean 'epochs'?
    """
    for name in values:
        if name not in valid:
            close = difflib.get_close_matches(name, valid, n=1, cutoff=0.0)
            raise ValueError(
                f"unknown field {name!r} in {where}" + "".join(f": did you mean {c!r}?" for c in close)
            )


class Config(BaseModel):
    """Frozen, complete; unknown fields are refused, in nested records too."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            refuse_unknown(values, list(cls.model_fields), cls.__name__)
            for name, value in values.items():
                _refuse_credentials(name, value)
                record = cls.model_fields[name].annotation
                if dataclasses.is_dataclass(record) and isinstance(value, Mapping):
                    refuse_unknown(value, [field.name for field in dataclasses.fields(record)], name)
        return values


def _refuse_credentials(name: str, value: Any) -> None:
    """What is configured is kept: in MLflow, in Prefect, in tables."""
    if isinstance(value, str | Path) and has_credentials(str(value)):
        raise ValueError(
            f"{name} {redact(str(value))!r} has credentials in it, which would be kept with the run: give "
            "them by the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for S3)"
        )


def _model_settings(tag: str) -> type[Config]:
    """What a model family of `vae.config` lets a user choose: its fields less the geometry."""
    config = vae.config.config_class(tag)
    hints = get_type_hints(config)
    fields: dict[str, Any] = {"model": (Literal[tag], tag)}
    for field in dataclasses.fields(config):
        if field.name not in GEOMETRY:
            fields[field.name] = (hints[field.name], field.default)
    return create_model(config.__name__, __base__=Config, __doc__=config.__doc__, **fields)


if TYPE_CHECKING:
    ModelSettings = Config
else:
    _FAMILIES = tuple(_model_settings(tag) for tag in vae.config.MODELS)
    ModelSettings = Annotated[Union[_FAMILIES], Field(discriminator="model")]  # noqa: UP007


C = TypeVar("C", bound="Command")
Device = Literal["auto", "cpu", "cuda"]


# Marks a field that the command line takes by its place, not by an option.
ARGUMENT: dict[str, Any] = {"argument": True}


class Command(Config):
    """What every command takes; one that `writes` needs a root that can be written, and makes it."""

    writes: ClassVar[bool] = True

    root: Path = Field(
        default_factory=default_root, description="folder of all state: tables, models, MLflow"
    )


class Images(Command):
    """What every command that reads images takes."""

    source: str = Field(
        "digits",
        description="digits, idx:DIR, folder:DIR, tar:DIR, parquet:DIR, torchvision:NAME or snapshot:DIR",
    )
    limit: int | None = Field(None, ge=1, description="read N of the images only, the same ones every time")
    max_reject_share: float = Field(
        0.01, ge=0, le=1, description="share of unreadable images that fails the run"
    )


class Ingest(Images):
    """Decode a source into an immutable snapshot."""

    duplicates: Literal["keep", "drop", "fail"] = Field("keep", description="what to do with equal images")
    decode: DecodePath = DecodePath()


class Train(Ingest):
    """Train a model on a source's training split; resumes from the last checkpoint."""

    preset: str = Field(
        "",
        description=f"{', '.join(PRESETS)}; by default digits for digits, else textbook",
        json_schema_extra={"enum": ["", *PRESETS]},
    )
    model_name: str = Field("", description="name in the MLflow registry; by default vae-<source>")
    device: Device = Field("auto", description="auto: the GPU when there is one")
    devices: int = Field(1, ge=1, description="processes that train together, each on a GPU of its own")
    resident_mib: int = Field(
        4096, ge=0, description="MiB of training images that stay on the device; more are streamed"
    )
    warm_start: str = Field(
        "", description="models:/NAME@champion, a version or a bundle's folder whose weights to start from"
    )
    # Always filled in from the preset, so a form or a program may leave it out.
    model: ModelSettings = Field(default_factory=lambda: Config())
    training: vae.config.TrainConfig = vae.config.TrainConfig()

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        name = values.get("preset") or (
            "digits" if values.get("source", "digits") == "digits" else "textbook"
        )
        vae.config.check_choice("preset", name, PRESETS)
        return _over_preset(PRESETS[name](), {**values, "preset": name})

    @model_validator(mode="after")
    def _check(self) -> Self:
        # A nonsensical model is refused now, on some geometry, not after the images have been read.
        self.model_of(64, 64, 1)
        if not self.model_name:
            object.__setattr__(self, "model_name", f"vae-{source_name(self.source)}")
        return self

    def model_of(self, height: int, width: int, channels: int) -> vae.config.ModelConfig:
        """The model's complete configuration for images of this geometry."""
        geometry = {"height": height, "width": width, "channels": channels}
        return vae.config.model_config({**self.model.model_dump(), **geometry})


class Scoring(Command):
    """How a model is scored."""

    importance_samples: int = Field(50, ge=1, description="draws an image for the importance-weighted bound")


class Drawing(Command):
    """How images are sampled from the prior."""

    count: int = Field(64, ge=1, description="images to sample")
    temperature: float = Field(1.0, ge=0, description="scale of the prior's standard deviation")


class Output(Command):
    """Where tables go."""

    out: str = Field("", description="URI of a folder for tables; by default under the root")


class Sharing(Command):
    """Who works on the shards of an encode."""

    runner: str = Field(
        "here", description="who works: here, processes:N, ray (RAY_ADDRESS) or ray://HOST:PORT"
    )

    @model_validator(mode="after")
    def _has_a_runner(self) -> Self:
        from flows import runners

        runners.parse(self.runner)
        return self


class Retrain(Sharing, Output, Drawing, Scoring, Train):  # in the order of their fields, last first
    """Ingest, train, evaluate, register, gate, then encode and sample with the champion."""

    margin: float = Field(0.0, ge=0, description="nats an image by which a new champion must win, at least")


class Serve(Retrain):
    """Retrain, encode and report with the champion, on a schedule and on events, until stopped."""

    retrain_cron: str = Field("0 3 * * *", description="when to retrain; '' for events alone")
    encode_cron: str = Field("0 * * * *", description="when to encode what is new; '' for events alone")
    report_cron: str = Field("0 6 * * 1", description="when to draw the champion's report; '' for never")
    timezone: str = Field("UTC", description="of the schedules")
    write: Path | None = Field(None, description="only write the deployments, as this prefect.yaml")


class Bootstrap(Command):
    """Set up a Prefect server: the limit on GPUs, the automation for zombies, notifications."""

    writes: ClassVar[bool] = False

    gpus: int = Field(1, ge=1, description="tasks that may use a GPU at once")
    zombie_seconds: int = Field(
        120, ge=60, description="seconds without heartbeat after which a run is marked Crashed"
    )
    notify: str = Field("", description="TYPE/NAME of a block that is told of failure, promotion and drift")


class Reconcile(Command):
    """Close what a kill has left open: MLflow runs whose Prefect run is over, promotions half-done."""


class Clean(Command):
    """Remove what has served: checkpoints of finished jobs, old challengers with their jobs and tables."""

    keep: int = Field(5, ge=1, description="newest versions, and last champions, that each model keeps")


class Doctor(Command):
    """Check devices, servers, credentials and versions, and say what to do."""

    writes: ClassVar[bool] = False


class WithModel(Command):
    """What every command that uses a trained model takes."""

    model: str = Field("", description="models:/NAME@champion, models:/NAME/VERSION or a bundle's folder")
    device: Device = Field("auto", description="auto: the GPU when there is one")
    seed: int = Field(0, ge=0, description="of the noise")

    @model_validator(mode="after")
    def _has_model(self) -> Self:
        if not self.model:
            raise ValueError("no model given: --model models:/NAME@champion or a bundle's folder")
        return self


class Pull(Command):
    """Fetch a model's bundle from the registry: digests checked, nothing of it executed."""

    writes: ClassVar[bool] = False

    model: str = Field(
        description="models:/NAME@champion or models:/NAME/VERSION", json_schema_extra=ARGUMENT
    )
    directory: Path = Field(description="a new folder for the bundle", json_schema_extra=ARGUMENT)


class Sign(Command):
    """Sign a registered version, so that who has the public key can tell that it is yours, and unaltered."""

    writes: ClassVar[bool] = False

    model: str = Field(
        description="models:/NAME/VERSION or models:/NAME@champion", json_schema_extra=ARGUMENT
    )
    key: Path = Field(description="file of an elliptic-curve private key, PEM without a password")

    @model_validator(mode="after")
    def _has_key(self) -> Self:
        if not self.model.startswith("models:/"):
            raise ValueError(f"model {self.model!r} is not models:/NAME/VERSION: a signature is kept there")
        if not self.key.is_file():
            raise ValueError(f"no key in {str(self.key)!r}")
        return self


class Report(Scoring, WithModel):
    """Draw what a model has learned as one HTML page, with its figures."""

    model: str = Field(
        description="models:/NAME@champion, models:/NAME/VERSION or a bundle's folder",
        json_schema_extra=ARGUMENT,
    )
    source: str = Field("", description="images to show it on; by default the snapshot it was trained on")
    points: int = Field(10_000, ge=2, le=50_000, description="images on the latent map, at most")
    out: Path | None = Field(
        None, description="file for the page, beside the one that is kept under the root"
    )


class Export(Pull):
    """Write a model's encoder and decoder as graphs that need no code of ours."""

    onnx: bool = Field(True, description="ONNX beside torch's .pt2; needs the extra vae-flows[onnx]")


class Registered(Command):
    """What every command takes that moves a registered model's champion alias."""

    name: str = Field(description="the model's name in the registry", json_schema_extra=ARGUMENT)


class Promote(Registered):
    """Make a version the champion by hand; the tables that follow it are encoded again."""

    version: str = Field(description="the version's number", json_schema_extra=ARGUMENT)
    reason: str = Field("", description="why, for the history")

    @model_validator(mode="after")
    def _has_reason(self) -> Self:
        if not self.reason.strip():
            raise ValueError("no reason given: --reason TEXT goes into the history of the alias")
        return self


class Rollback(Registered):
    """Make the previous champion the champion again, its latent tables included."""

    reason: str = Field("", description="why, for the history")


class Follow(Registered):
    """Bring the latent tables that follow a model's champion up to date."""

    drop: str = Field("", description="a source whose table is to follow no more")


class Lineage(Command):
    """Say what a thing was made of, and what was made of the same dataset."""

    writes: ClassVar[bool] = False

    thing: str = Field(
        description="a table's URI, models:/NAME@ALIAS, models:/NAME/VERSION, or a dataset's fingerprint",
        json_schema_extra=ARGUMENT,
    )


class Tables(Command):
    """Look after tables: list those under a folder; show, verify, sweep or name the files of one."""

    writes: ClassVar[bool] = False

    action: Literal["list", "show", "verify", "gc", "files"] = Field(
        description="list: what is there; show: what one is and what made it; verify: every digest,\n"
        "checksum and count; gc: remove what no manifest names; files: the exact list, for any reader",
        json_schema_extra=ARGUMENT,
    )
    table: str = Field(
        "", description="path or URL of a table; for list, a folder of tables (default: the root)",
        json_schema_extra=ARGUMENT,
    )  # fmt: skip

    @model_validator(mode="after")
    def _has_table(self) -> Self:
        if self.action != "list" and not self.table:
            raise ValueError(f"no table given: vae-flows tables {self.action} TABLE, a path or URL")
        return self


class Browse(Command):
    """What the commands take that look into a table."""

    table: str = Field(
        description="path or URL of a table: latents, samples or a snapshot", json_schema_extra=ARGUMENT
    )
    count: int = Field(10, ge=1, le=10_000, description="rows to show")
    seed: int = Field(0, ge=0, description="of the draw, or of the noise")


class Show(Browse):
    """Print some rows of a table, drawn at random, with the paths of thumbnails of their images."""


class Nearest(Browse):
    """Show the images whose latents lie closest to that of an image."""

    image: str = Field(description="an id in the table, or an image file", json_schema_extra=ARGUMENT)
    model: str = Field("", description="encodes an image file; by default the model that made the table")
    device: Device = Field("auto", description="auto: the GPU when there is one")
    picture: Path = Field(Path("nearest.png"), description="file for a picture: the image, then the others")


class Evaluate(Scoring, Images, WithModel):
    """Score a model on a split of a source."""

    split: Literal["train", "validation", "test"] = Field("test", description="images to score")


class Encode(Output, Sharing, Images, WithModel):
    """Encode every image of a source into a latent table."""

    scores: bool = Field(False, description="also store log_likelihood and elbo of each image")
    shard: str = Field("", description="I/N: begin with the I-th of N parts; others may run the same command")
    shard_rows: int = Field(
        65_536, ge=1, description="images of a shard: the unit of work, and a file's rows"
    )
    follow: bool = Field(False, description="from now on, encode again whenever the champion changes")
    min_kl: float | None = Field(
        None,
        ge=0,
        description="keep only the dimensions whose mean KL on validation images is above, in nats",
    )

    @model_validator(mode="after")
    def _begins_with_a_part(self) -> Self:
        from flows import runners

        runners.parse_part(self.shard)
        return self

    @model_validator(mode="after")
    def _follows_an_alias(self) -> Self:
        if self.follow and not re.fullmatch("models:/[^/@]+@champion", self.model):
            raise ValueError(f"--follow needs --model models:/NAME@champion, not {self.model!r}")
        return self


class Drift(Output, Images, WithModel):
    """Compare images that a model encodes now with the images it came from."""

    table: str = Field("", description="a latent table of the new images, with scores, instead of --source")
    reference: str = Field(
        "", description="a latent table to compare with; by default that of the model's own snapshot"
    )
    split: Literal["held-out", "train", "validation", "test"] = Field(
        "held-out", description="rows of the reference; the model scores better on those it was trained on"
    )
    rows: int = Field(2000, ge=20, le=20_000, description="images of each side at most, drawn at random")
    level: float = Field(0.05, gt=0, lt=1, description="how often same data may raise a false alarm")


class Sample(Output, Drawing, WithModel):
    """Sample images from the prior, or from a mixture fitted to latents, into a sample table."""

    prior: Literal["model", "mixture"] = Field(
        "model", description="the model's own, or a Gaussian mixture fitted to --table's latents"
    )
    mixture_components: int = Field(20, ge=1, description="Gaussians of the mixture")
    table: str = Field("", description="a latent table of this model, for --prior mixture")

    @model_validator(mode="after")
    def _prior_and_table(self) -> Self:
        if (self.prior == "mixture") != bool(self.table):
            raise ValueError("--prior mixture and --table go together: the mixture is fitted to its latents")
        if self.prior == "mixture" and self.temperature != 1:
            raise ValueError(f"--temperature {self.temperature:g} is of the model's prior, not of a mixture")
        return self


class Picture(WithModel):
    """What the commands take that draw with a model: files or rows of a latent table in, a picture out."""

    table: str = Field("", description="a latent table of this model: ids and attributes are looked up in it")
    picture: Path = Field(Path("picture.png"), description="file for the picture")
    out: str = Field("", description="URI of a folder for a table of the latents and images, if wanted")


class Reconstruct(Picture):
    """Draw images over their reconstructions."""

    images: tuple[str, ...] = Field(description="image files, or ids in --table", json_schema_extra=ARGUMENT)


class Interpolate(Picture):
    """Draw the way from one image to another."""

    a: str = Field(description="image file, or id in --table", json_schema_extra=ARGUMENT)
    b: str = Field(description="image file, or id in --table", json_schema_extra=ARGUMENT)
    steps: int = Field(9, ge=2, description="images on the way, both ends included")
    start: float = Field(0.0, description="degree of the first: 0 is the reconstruction of A")
    stop: float = Field(1.0, description="degree of the last: 1 is the reconstruction of B; beyond is fine")
    how: Literal["linear", "spherical"] = Field("linear", description="the path's shape")


class Edit(Picture):
    """Draw an image with an attribute added to several degrees."""

    image: str = Field(description="image file, or id in --table", json_schema_extra=ARGUMENT)
    attribute: str = Field("", description="a numeric column of --table, or one of its labels")
    instead_of: str = Field(
        "", description="a label that the attribute's label replaces; by default all others"
    )
    degree: float = Field(
        1.0, description="how much of the attribute the last image has; negative takes it away"
    )
    steps: int = Field(7, ge=2, description="images from degree 0 to the given one")

    @model_validator(mode="after")
    def _has_attribute(self) -> Self:
        if not self.attribute or not self.table:
            raise ValueError("an edit needs --attribute, and --table, whose rows show what the attribute is")
        return self


def _over_preset(preset: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What the user gave, over the preset; of another model family, the preset's model says nothing."""
    merged = {**preset, **values}
    for section in ("model", "training"):
        given = values.get(section, {})
        if isinstance(given, Mapping):
            other = (
                section == "model"
                and given.get("model", preset["model"]["model"]) != preset["model"]["model"]
            )
            own = {} if other else dict(preset[section])
            if "epochs" in given:  # whoever says how many means it
                own.pop("min_steps", None)
            merged[section] = {**own, **given}
    return merged


def narrow(command: type[C], config: Command, **changes: Any) -> C:
    """The part of a configuration that another command takes, with changes.

    >>> narrow(Ingest, Train(source="idx:mnist")).source
    'idx:mnist'
    """
    shared = {
        name: getattr(config, name) for name in type(config).model_fields if name in command.model_fields
    }
    return command(**{**shared, **changes})


def to_toml(values: dict[str, Any]) -> str:
    """A configuration as TOML that --config reads back; what is not set stands as a comment."""
    import tomli_w

    unset = [f"# {name}: not set" for name, value in values.items() if value is None]
    return "\n".join([*unset, tomli_w.dumps(_without_none(values)).rstrip()])


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in values.items() if value is not None}
    return {name: _without_none(value) if isinstance(value, dict) else value for name, value in kept.items()}


def source_name(uri: str) -> str:
    """A short name for what a source holds.

    >>> source_name("idx:/usr/share/datasets/fashion-mnist"), source_name("digits")
    ('fashion-mnist', 'digits')
    """
    tail = uri.split(":", 1)[-1].rstrip("/").rsplit("/", 1)[-1]
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in tail) or "images"


# The nested records of a configuration: what may stand in a section, and whose docstring explains it.
SECTIONS: dict[str, list[type]] = {
    "decode": [DecodePath],
    "training": [vae.config.TrainConfig],
    "model": [vae.config.config_class(tag) for tag in vae.config.MODELS],
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One leaf of a configuration, as the command line offers it."""

    section: str
    name: str
    annotation: Any
    default: Any
    help: str = ""
    argument: bool = False


def settings(command: type[Command]) -> list[Setting]:
    """Every leaf of a configuration, those of its sections too.

    >>> sorted(setting.name for setting in settings(Sample))
    ['count', 'device', 'mixture_components', 'model', 'out', 'prior', 'root', 'seed', 'table', 'temperature']
    """
    leaves = []
    for name, field in command.model_fields.items():
        if (issubclass(command, Train) and name in SECTIONS) or name == "decode":
            leaves += _section(name)
        else:
            argument = field.json_schema_extra == ARGUMENT
            leaves.append(
                Setting("", name, field.annotation, field.default, field.description or "", argument)
            )
    return leaves


def _section(name: str) -> list[Setting]:
    """The fields of a section's records; model families share names, so each name once."""
    leaves = {"model": Setting(name, "model", str, "")} if name == "model" else {}
    for record in SECTIONS[name]:
        hints = get_type_hints(record)
        for field in dataclasses.fields(record):
            if name != "model" or field.name not in GEOMETRY:
                leaves.setdefault(field.name, Setting(name, field.name, hints[field.name], field.default))
    return list(leaves.values())
