"""Models in the MLflow registry: publish once a job, pin an alias, bring the bundle here."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.jobs import lock
from flows.spool import patiently
from flows.tracking import Run, client

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models.model import ModelInfo

logger = logging.getLogger("vae_flows.registry")
JOB_TAG = "vae_flows.job"
PUBLIC_KEY = "VAE_FLOWS_PUBLIC_KEY"  # names the file of the key that models from the registry are signed with
CHAMPION, CHALLENGER = "champion", "challenger"
BUNDLE = "artifacts/bundle"  # in the logged model, where MLflow keeps a folder under its own name


@dataclass(frozen=True)
class Located:
    """A model pinned: its URI, the folder of its bundle on this machine, and its place in the registry."""

    uri: str
    folder: Path
    name: str = ""
    version: str = ""

    def files(self) -> dict[str, bytes]:
        """The bundle's files by name."""
        from vae.bundle import read_files

        return read_files(self.folder)

    def facts(self) -> dict[str, Any]:
        """The bundle's config.json, digests checked, and the digest of its weights; loads no model."""
        from vae.bundle import read_config, weights_digest

        files = self.files()
        return {**read_config(files), "weights": weights_digest(files)}


def pin(uri: str) -> str:
    """An alias's or the latest version's URI as the version it names now; any other URI unchanged.

    >>> pin("models:/digits/3")
    'models:/digits/3'
    """
    if not uri.startswith("models:/"):
        return uri
    name, alias, version = parse(uri)
    return f"models:/{name}/{version or _version_of(name, alias)}"


def parse(uri: str) -> tuple[str, str, str]:
    """(name, alias, version) of a registry URI, of which alias or version is ''.

    >>> parse("models:/digits@champion")
    ('digits', 'champion', '')
    """
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
    if match is None:
        raise ValueError(f"model {uri!r} is not models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, version = match.groups(default="")
    return name, alias, version


def locate(uri: str, *, verified: bool = True) -> Located:
    """Pin a model and bring its bundle to this machine; ValueError where there is none.

    Or, unless it need not be `verified`, where a public key is configured and it is not signed with its own.
    """
    pinned = pin(uri)
    if not pinned.startswith("models:/"):
        folder = Path(uri.removeprefix("file://"))
        if not (folder / "manifest.json").is_file():
            raise ValueError(f"no model bundle in {uri!r}: give its folder, or models:/NAME@champion")
        return Located(str(folder.resolve()), folder)
    name, version = pinned.removeprefix("models:/").split("/")
    found = Located(pinned, _download(pinned), name, version)
    if verified and (key := os.environ.get(PUBLIC_KEY)):
        from flows.sign import require_signed

        require_signed(found, Path(key))
    return found


def _version_of(name: str, alias: str) -> str:
    import mlflow

    try:
        return str(client().get_model_version_by_alias(name, alias).version)
    except mlflow.MlflowException as error:
        raise ValueError(f"no model 'models:/{name}@{alias}' in the registry: {error.message}") from error


def _download(pinned: str) -> Path:
    import mlflow

    try:
        return Path(patiently(lambda: mlflow.artifacts.download_artifacts(f"{pinned}/{BUNDLE}")))
    except (mlflow.MlflowException, OSError) as error:
        raise ValueError(f"no model bundle at {pinned!r}: {error}") from error


def find(name: str, job: str) -> ModelVersion | None:
    """The version that this job registered, if it did."""
    found = client().search_model_versions(f"name = '{name}' and tags.`{JOB_TAG}` = '{job}'")
    return min(found, key=lambda version: int(version.version), default=None)


def register(
    run: Run, root: Path, name: str, job: str, bundle: Path, tags: Mapping[str, str]
) -> ModelVersion:
    """The version of this job: found, or logged to the run and created, once whoever else tries."""
    with lock(root, f"register-{name}"):
        if (found := find(name, job)) is not None:
            return found
        logged = patiently(lambda: _log_model(run, bundle))
        _ensure_model(name)
        version = patiently(
            lambda: find(name, job) or _create_version(run, name, logged, {JOB_TAG: job, **tags})
        )
        client().set_registered_model_alias(name, CHALLENGER, version.version)
    logger.info("register: %s version %s", name, version.version)
    return version


def _create_version(run: Run, name: str, logged: ModelInfo, tags: Mapping[str, str]) -> ModelVersion:
    """Once: whoever asks again looks first, since an answer may have been lost."""
    import mlflow

    # A server refuses a logged model as source without its id; a local store does not ask.
    return mlflow.MlflowClient().create_model_version(
        name, logged.model_uri, run.id, tags=dict(tags), model_id=logged.model_id
    )


def _ensure_model(name: str) -> None:
    import mlflow

    try:
        client().create_registered_model(name)
    except mlflow.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _log_model(run: Run, bundle: Path) -> ModelInfo:
    """Log the bundle as a pyfunc made of code that MLflow copies."""
    import mlflow

    import vae

    here = Path(__file__).parent
    signature, example = _signature(bundle)
    with mlflow.start_run(run_id=run.id):
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(here / "pyfunc_model.py"),
            artifacts={"bundle": str(bundle)},
            code_paths=[str(Path(vae.__path__[0]))],
            pip_requirements=_requirements(),
            signature=signature,
            input_example=example,
        )
    client().update_run(run.id, status="RUNNING")  # which leaving the block has set to FINISHED
    return logged


def _signature(bundle: Path) -> tuple[Any, Any]:
    """Images uint8 (-1, C, H, W) in, posterior means float32 (-1, D) out; an example of two images.

    The params are those of `flows.pyfunc_model`; MLflow refuses any that are not in the signature.
    """
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    import vae

    model = vae.load(bundle)
    shape = model.config.image_shape
    inputs = Schema([TensorSpec(np.dtype("uint8"), (-1, *shape))])
    outputs = Schema([TensorSpec(np.dtype("float32"), (-1, model.latent_dim))])
    params = ParamSchema([ParamSpec("output", "string", "mean"), ParamSpec("seed", "long", 0)])
    return ModelSignature(inputs, outputs, params), np.zeros((2, *shape), np.uint8)


def _requirements() -> list[str]:
    """What a consumer needs to run the model: the versions that made it, and nothing of this repository."""
    from importlib.metadata import version

    return [f"{name}=={version(name).split('+')[0]}" for name in ("mlflow", "numpy", "safetensors", "torch")]


def champion_uri(name: str) -> str | None:
    """The champion, pinned to its version, or None."""
    version = champion(name)
    return f"models:/{name}/{version}" if version else None


def champion(name: str) -> str | None:
    """The version that carries the alias now, or None."""
    import mlflow

    try:
        version = client().get_registered_model(name).aliases.get(CHAMPION)
    except mlflow.MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return None if version is None else str(version)


def set_champion(name: str, version: str) -> None:
    """Move the alias; `promotion` records that first."""
    client().set_registered_model_alias(name, CHAMPION, version)


def require(name: str) -> None:
    """Refuse a name that no registered model has."""
    import mlflow

    try:
        client().get_registered_model(name)
    except mlflow.MlflowException as error:
        raise ValueError(f"no model {name!r} in the registry: {error.message}") from error


def exists(name: str, version: str) -> bool:
    """Whether the registry has this version."""
    import mlflow

    try:
        client().get_model_version(name, version)
    except mlflow.MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def run_of(name: str, version: str) -> str:
    """The MLflow run that made a version."""
    return str(client().get_model_version(name, version).run_id)


def set_tag(name: str, version: str, key: str, value: str) -> None:
    """Put a fact on a version."""
    client().set_model_version_tag(name, version, key, value)


def describe(name: str, version: str, card: str) -> None:
    """Put a model card where the registry shows it: a version's description."""
    client().update_model_version(name, version, description=card)


def tags(name: str, version: str) -> dict[str, str]:
    """A version's tags; ValueError where there is no such version."""
    import mlflow

    try:
        return dict(client().get_model_version(name, version).tags)
    except mlflow.MlflowException as error:
        raise ValueError(f"no model 'models:/{name}/{version}' in the registry: {error.message}") from error
