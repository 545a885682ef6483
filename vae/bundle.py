"""A model as three files: model.safetensors, config.json, manifest.json with the SHA-256 of the other two.

Reading one runs no code of its own: JSON and safetensors are data, and the class is looked up in our
allowlist. Nothing is built before digests, names and shapes are found right.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from vae.config import model_class, model_config
from vae.model import Model

WEIGHTS, CONFIG, MANIFEST = "model.safetensors", "config.json", "manifest.json"
FILES = (MANIFEST, CONFIG, WEIGHTS)
FORMAT = 1


def to_files(model: Model, extra: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    """The bundle's files by name; the same model and extra give the same bytes.

    extra: facts in JSON that travel with the model (decode path, dataset); `model.extra` by default.
    """
    config = {
        "format": FORMAT,
        "model": model.config.to_dict(),
        "levels": model.levels,
        "extra": dict(model.extra if extra is None else extra),
    }
    files = {WEIGHTS: _weights(model), CONFIG: _json(config)}
    return files | {MANIFEST: _manifest(files)}


def from_files(files: Mapping[str, bytes]) -> Model:
    """The model of a bundle, on the CPU, in evaluation mode.

    Raises:
        ValueError: a missing or altered file, an unknown model or field, weights that do not fit.
    """
    config = read_config(files)
    try:
        weights = safetensors.torch.load(files[WEIGHTS])
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS} cannot be read: {error}") from error
    described = model_config(config["model"])
    with torch.device("meta"):  # shapes without memory: a lying configuration allocates nothing
        model: Model = model_class(described)(described)
    model.load_state_dict(_fitted(model, weights), assign=True)
    model.extra = config["extra"]
    return model.eval()


def read_config(files: Mapping[str, bytes]) -> dict[str, Any]:
    """config.json of a bundle (format, model, levels, extra), after checking every file's digest."""
    missing = [name for name in FILES if name not in files]
    if missing:
        raise ValueError(f"the bundle lacks {', '.join(missing)}")
    stated = _parse(MANIFEST, files[MANIFEST]).get("sha256")
    for name in (CONFIG, WEIGHTS):
        if not isinstance(stated, dict) or hashlib.sha256(files[name]).hexdigest() != stated.get(name):
            raise ValueError(
                f"{name} of the bundle is not the file that {MANIFEST} states: its SHA-256 differs"
            )
    if files[MANIFEST] != _manifest(files):
        raise ValueError(f"{MANIFEST} of the bundle is altered: more than the digests differs in it")
    config = _parse(CONFIG, files[CONFIG])
    if config.get("format") != FORMAT or not all(isinstance(config.get(k), dict) for k in ("model", "extra")):
        raise ValueError(f"{CONFIG} has format {config.get('format')!r}; this version reads format {FORMAT}")
    return config


def load(directory: str | Path) -> Model:
    """The model whose bundle lies in a folder."""
    return from_files(read_files(Path(directory)))


def read_files(folder: Path) -> dict[str, bytes]:
    """A bundle's files by name, as far as they lie in a folder; whatever else does is not the bundle's."""
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


def weights_digest(source: Model | Mapping[str, bytes]) -> str:
    """SHA-256 of the weights file, the same for a model and for its bundle."""
    content = _weights(source) if isinstance(source, Model) else source[WEIGHTS]
    return hashlib.sha256(content).hexdigest()


def _manifest(files: Mapping[str, bytes]) -> bytes:
    digests = {name: hashlib.sha256(files[name]).hexdigest() for name in (WEIGHTS, CONFIG)}
    return _json({"format": FORMAT, "sha256": digests})


def _weights(model: Model) -> bytes:
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    return safetensors.torch.save(state)


def _fitted(model: Model, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in the memory layout of the model's own, after checking every name, shape and dtype."""
    wanted = model.state_dict()
    if wanted.keys() != weights.keys():
        differing = sorted(wanted.keys() ^ weights.keys())
        raise ValueError(
            f"{WEIGHTS} does not fit the model of {CONFIG}: "
            f"{len(differing)} names differ, the first of them {differing[0]!r}"
        )
    for name, tensor in weights.items():
        shape = tuple(wanted[name].shape)
        if tensor.shape != shape or not tensor.is_floating_point():
            raise ValueError(
                f"{name!r} of {WEIGHTS} is {tensor.dtype} {tuple(tensor.shape)}; the model needs {shape}"
            )
    return {n: torch.empty_like(wanted[n], device="cpu", dtype=t.dtype).copy_(t) for n, t in weights.items()}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _parse(name: str, content: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{name} must be a JSON object")
    return parsed
