"""Malicious artifacts through every command that reads a model: nothing of them is executed.

Each artifact is a model version as an attacker with write access to the registry would leave it: the bundle's
digests are made to agree. Whatever would run creates a canary, a file that must not be there afterwards.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults import bodies
from tests.faults.trials import Experiment, Found, found_in_child, in_child, unless

NAME, AT_ONCE = "vae-hostile", 5
MEMORY = 6 << 30  # bytes that a command may map, beside what is mapped already
Files = dict[str, bytes]


class Canary:
    """Executes when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def code(canary: Path) -> bytes:
    """Python that executes when it is imported."""
    return f"import os\nos.mkdir({str(canary)!r})\n".encode()


# -- the artifacts: of a good bundle's files, the files of a bad one, by place in the logged model


def artifacts(good: Files, canary: Path) -> Iterator[tuple[str, Files]]:
    """A name and the files of each; those of the bundle under artifacts/bundle."""
    bundled = [*pickles(canary), *headers(good), *configurations(good)]
    for name, changed in bundled:
        yield name, {f"artifacts/bundle/{file}": data for file, data in forged(good | changed).items()}
    for name, beside in [*mlmodels(canary), *codes(canary), *archives(canary)]:
        whole = {f"artifacts/bundle/{file}": data for file, data in good.items()}
        yield name, whole | beside


def forged(files: Files) -> Files:
    """The bundle with a manifest that agrees with it."""
    digests = {n: hashlib.sha256(files[n]).hexdigest() for n in ("model.safetensors", "config.json")}
    manifest = json.dumps({"format": 1, "sha256": digests}, indent=1, sort_keys=True) + "\n"
    return {"manifest.json": manifest.encode()} | files


def pickles(canary: Path) -> Iterator[tuple[str, Files]]:
    """Pickles where data belongs."""
    import torch

    for protocol in range(6):
        yield f"pickle {protocol} as weights", {"model.safetensors": pickle.dumps(Canary(canary), protocol)}
    yield "pickle as configuration", {"config.json": pickle.dumps(Canary(canary))}
    yield "pickle as manifest", {"manifest.json": pickle.dumps(Canary(canary))}
    saved = io.BytesIO()
    torch.save({"weights": Canary(canary)}, saved)
    yield "torch.save as weights", {"model.safetensors": saved.getvalue()}
    array = io.BytesIO()
    np.save(array, np.array([Canary(canary)], object), allow_pickle=True)
    yield "object array as weights", {"model.safetensors": array.getvalue()}


def headers(good: Files) -> Iterator[tuple[str, Files]]:
    """Safetensors whose header lies."""
    for size in (2**63 - 1, 2**64 - 1, 2**40, 100_000_001, 0):
        yield f"header of {size} bytes", {"model.safetensors": struct.pack("<Q", size) + b"{}"}
    nested = b"[" * 1_000_000
    yield "nested header", {"model.safetensors": struct.pack("<Q", len(nested)) + nested}
    for name, tensor in {
        "huge shape": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 4]},
        "negative shape": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        "offsets beyond the end": {"dtype": "F32", "shape": [1], "data_offsets": [2**40, 2**40 + 4]},
        "offsets backwards": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        "unknown type": {"dtype": "O", "shape": [1], "data_offsets": [0, 4]},
    }.items():
        head = json.dumps({"encoder.weight": tensor}).encode()
        yield name, {"model.safetensors": struct.pack("<Q", len(head)) + head + bytes(4)}
    yield "cut weights", {"model.safetensors": good["model.safetensors"][:-64]}


def configurations(good: Files) -> Iterator[tuple[str, Files]]:
    """Configurations that name code, nest deeply or ask for all memory."""
    config = json.loads(good["config.json"])

    def changed(**model: Any) -> Files:
        return {"config.json": json.dumps(config | {"model": config["model"] | model}).encode()}

    for tag in ("os.system", "__import__('os').mkdir", "../../evil", "vae.bundle:load", "tests.tiny_model"):
        yield f"model {tag}", changed(model=tag)
    yield "network by name", changed(network="__class__")
    yield "a huge latent", changed(latent_dim=10**12)
    yield "a huge image", changed(height=10**9, width=10**9)
    yield "hidden layers without end", changed(hidden=[2**31] * 1000)
    yield "nested configuration", {"config.json": b'{"model":' * 200_000}
    yield "endless number", {"config.json": b'{"format": 1' + b"0" * 1_000_000 + b"}"}
    decode = {"config.json": json.dumps(config | {"extra": {"decode": {"filter": "__import__"}}}).encode()}
    yield "decode path by name", decode
    yield "not text", {"config.json": b"\xff\xfe\x00"}


def mlmodels(canary: Path) -> Iterator[tuple[str, Files]]:
    """MLmodel files that name a loader, a class to build, code to run."""
    flavor = "flavors:\n  python_function:\n    loader_module: {}\n    code: code\n    data: artifacts\n"
    yield "loader module", {"MLmodel": flavor.format("evil").encode(), "code/evil.py": code(canary)}
    apply = f"flavors: !!python/object/apply:os.mkdir ['{canary}']\n"
    yield "YAML that builds", {"MLmodel": apply.encode()}
    python = (
        "flavors:\n  python_function:\n    loader_module: mlflow.pyfunc.model\n    python_model: evil.pkl\n"
    )
    yield "pickled model", {"MLmodel": python.encode(), "evil.pkl": pickle.dumps(Canary(canary))}
    script = python.replace("evil.pkl", "evil.py") + "    model_code_path: evil.py\n"
    yield "model from code", {"MLmodel": script.encode(), "evil.py": code(canary)}
    yield "requirements", {"requirements.txt": b"-e ./evil\n", "evil/setup.py": code(canary)}


def codes(canary: Path) -> Iterator[tuple[str, Files]]:
    """Code beside the bundle under names that are imported, or run at start."""
    for name in ("vae/__init__.py", "sitecustomize.py", "torch.py", "json.py", "evil.pth", "conftest.py"):
        yield f"{name} in the bundle", {f"artifacts/bundle/{name}": code(canary)}
        yield f"{name} in code", {f"code/{name}": code(canary)}


def archives(canary: Path) -> Iterator[tuple[str, Files]]:
    """Archives whose members lead outside."""
    up = f"../../../../../../../../../..{canary}"
    tar, zipped = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(up))
    with zipfile.ZipFile(zipped, "w") as packed:
        packed.writestr(up, b"out")
    yield "tar that leads out", {"artifacts/bundle/model.tar": tar.getvalue()}
    yield "zip that leads out", {"artifacts/bundle/model.zip": zipped.getvalue()}


# -- putting them through


Commands = Callable[[Path, str], dict[str, Callable[[], object]]]


def batch(commands: Commands, seed: int, folder: Path, shared: Path, most: int = AT_ONCE) -> Found:
    """A few of the artifacts, each through every one of the commands."""
    (bundle,) = (shared / "undisturbed/jobs").glob("train-*/bundle")
    good = {path.name: path.read_bytes() for path in bundle.iterdir()}
    (snapshot,) = (shared / "undisturbed/snapshots").iterdir()
    (folder / "images").write_text(f"snapshot:{snapshot}")
    found = Found(0)
    count = len(list(artifacts(good, folder / "canary")))
    for index in range(most):
        place = folder / f"{index}"
        name, files = list(artifacts(good, place / "canary"))[(seed * AT_ONCE + index) % count]
        shutil.copytree(shared / "empty", place / "root")
        for path, data in files.items():
            (place / "model" / path).parent.mkdir(parents=True, exist_ok=True)
            (place / "model" / path).write_bytes(data)
        look = lambda place=place, name=name: through(place, name, commands)  # noqa: E731
        found += Found() + found_in_child(look, folder / "log")
    return found


def through(place: Path, name: str, commands: Commands) -> Found:
    """One artifact as version 1 of a model; every command that reads it either refuses in a line or works."""
    registered = in_child(lambda: register(place), place / "log").given()
    found = Found(0)
    for command, body in commands(place, registered).items():
        ended = in_child(lambda body=body: limited(body), place / "log")
        refused = ended.code == 1 and str(ended.value).startswith("ValueError")
        found += unless(ended.code == 0 or refused, f"{name} through {command}: {ended.code}, {ended.value}")
        found += unless(not (place / "canary").exists(), f"{name} was executed by {command}")
    strange = sorted(path.name for path in (place / "out").rglob("*")) if (place / "out").exists() else []
    whole = ["config.json", "manifest.json", "model.safetensors"]
    return found + unless(strange in ([], whole), f"{name}: pull wrote {strange}")


def limited(body: Callable[[], object]) -> None:
    """Run with a cap of memory: a header that lies must not be believed."""
    soft = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
    body()


def register(place: Path) -> str:
    """The version, with scores that say it is sound: the first champion of its name."""
    from flows.environment import prepare as prepare_environment
    from flows.jobs import job_store, put_record

    prepare_environment(place / "root")
    from flows.tracking import client

    scores = {"job": "evaluate-forged", "model": "", "snapshot": "", "protocol": {}}
    forged_scores = scores | {"scores": {"elbo": {"value": -1.0, "stderr": 0.1}}}
    put_record(job_store(place / "root", "evaluate-forged"), "scores.json", forged_scores)
    client().create_registered_model(NAME)
    source = (place / "model").as_uri()
    run = client().create_run("0").info.run_id
    version = client().create_model_version(NAME, source, run, tags={"evaluation": "evaluate-forged"})
    return f"models:/{NAME}/{version.version}"


def reading(place: Path, model: str) -> dict[str, Callable[[], object]]:
    """What reads a registered model, as functions."""
    from flows.config import Encode, Promote, Pull

    root = place / "root"

    def pull() -> object:
        from flows.environment import prepare as prepare_environment
        from flows.pull import pull

        prepare_environment(root)
        return pull(Pull(root=root, model=model, directory=place / "out")) and None

    def encode() -> object:
        return flow("encode", Encode(root=root, model=model, source="digits", limit=10, follow=False))

    def promote() -> object:
        flow("promote", Promote(root=root, name=NAME, version="1", reason="an attack"))
        return flow("encode", Encode(root=root, model=f"models:/{NAME}@champion", source="digits", limit=10))

    return {"pull": pull, "encode": encode, "promote": promote}


def reporting(place: Path, model: str) -> dict[str, Callable[[], object]]:
    """What loads a registered model, scores it and draws what it does."""
    from flows.config import Report

    images = (place.parent / "images").read_text()
    config = Report(root=place / "root", model=model, source=images, importance_samples=2, points=10)
    return {"report": lambda: flow("report", config)}


def flow(name: str, config: Any) -> None:
    """A flow's own code, without Prefect's engine."""
    import importlib

    from flows.environment import prepare as prepare_environment

    prepare_environment(config.root)
    bodies.without_engine()
    getattr(importlib.import_module(f"flows.{name}"), name)(config)


IMPORTS = (*bodies.IMPORTS, "flows.pull", "flows.promote")
EXPERIMENTS = (
    Experiment(
        "a malicious artifact",
        "Through pull, encode and promote: refused in a line, or its data used; nothing of it is executed, "
        "nothing else written.",
        goal=60,
        batch=partial(batch, reading),
        few={"most": 2},
        prepare=bodies.prepare,
        imports=IMPORTS,
    ),
    Experiment(
        "a malicious artifact through report",
        "Refused in a line, or drawn from its data; nothing of it is executed.",
        goal=60,
        batch=partial(batch, reporting),
        few={"most": 2},
        prepare=bodies.prepare,
        imports=(*IMPORTS, "flows.report"),
    ),
)
