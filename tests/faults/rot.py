"""Bit rot in a table, a model, a checkpoint; and images that bad disks and hostile users have changed."""

from __future__ import annotations

import io
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from data.images import DecodePath, Limits, Rejected, decode
from tests.faults.trials import Experiment, Found, unless

FLIPS, MUTATIONS = 200, 500  # a batch


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    """The bytes with one bit of them turned."""
    damaged = bytearray(data)
    damaged[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def prepare(shared: Path) -> None:
    """A table of eleven rows and a reject; a small model's bundle."""
    from tests.test_tables import folder_of, run
    from vae.bundle import to_files
    from vae.config import FlatConfig
    from vae.model import build

    (folder_of(shared / "images", range(12)) / "0003.png").write_bytes(b"")
    run(shared / "images", shared / "tables", share=0.2)
    model = build(
        FlatConfig(
            height=8, width=8, channels=1, network="mlp", latent_dim=2, likelihood="discretized_logistic"
        ),
        0,
    )
    (shared / "bundle").mkdir()
    for name, content in to_files(model).items():
        (shared / "bundle" / name).write_bytes(content)


def table_rot(seed: int, folder: Path, shared: Path) -> Found:
    """Flip a bit of any file of a table: verified or read, it is refused by name."""
    from data.tables import read_latents
    from data.upkeep import verify

    shutil.copytree(shared / "tables", folder / "tables")
    (table,) = (folder / "tables").iterdir()
    verify(str(table))

    def readers(path: Path) -> list[Callable[[], Any]]:
        read = [lambda: verify(str(table))]
        return read + [lambda: read_latents(str(table))] * path.name.startswith(("part", "_manifest"))

    return rot(table, np.random.default_rng(seed), readers)


def bundle_rot(seed: int, folder: Path, shared: Path) -> Found:
    """Flip a bit of any file of a bundle: it is not loaded."""
    import vae

    shutil.copytree(shared / "bundle", folder / "bundle")
    vae.load(folder / "bundle")
    return rot(
        folder / "bundle", np.random.default_rng(seed), lambda path: [lambda: vae.load(folder / "bundle")]
    )


def rot(folder: Path, rng: np.random.Generator, readers: Callable[[Path], list[Callable[[], Any]]]) -> Found:
    """Flip a bit at a time in the files of a folder: each of their readers refuses, in a line."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = Found(trials=FLIPS)
    for _ in range(FLIPS):
        path = files[rng.integers(len(files))]
        whole = path.read_bytes()
        path.write_bytes(flipped(whole, rng))
        found += sum((unless_read(read, path) for read in readers(path)), Found(0))
        path.write_bytes(whole)
    return found


def unless_read(read: Callable[[], Any], path: Path) -> Found:
    """Torn if a reader takes a damaged file, broken if it refuses it with other words than a line."""
    try:
        read()
    except ValueError as error:
        return unless("\n" not in str(error), f"{path.name}: {error}")
    return Found(0, torn=1, note=f"damage of {path.name} went unseen")


def checkpoint_rot(seed: int, folder: Path, shared: Path) -> Found:
    """Flip a bit of the newest checkpoint: never used, and training goes on from the one before it."""
    import torch

    from data.store import open_store
    from flows.fitting import read_checkpoints
    from vae.config import FlatConfig, TrainConfig
    from vae.train import fit

    rng, store, blobs = np.random.default_rng(seed), open_store(folder), []
    images = rng.integers(0, 256, (64, 1, 8, 8), np.uint8)
    model = FlatConfig(height=8, width=8, channels=1, network="mlp", latent_dim=2)
    training = TrainConfig(epochs=2, batch_size=16, checkpoint_every=2)
    whole = fit(model, training, images, save=lambda step, blob: blobs.append((step, bytes(blob))))
    for step, blob in blobs[:3]:
        damaged = flipped(blob, rng) if step == blobs[2][0] else blob
        store.put_if_absent(f"checkpoints/{step:010d}.safetensors", damaged)
    again = fit(model, training, images, restore=lambda: read_checkpoints(store))
    expected, found = whole.model.state_dict(), again.model.state_dict()
    same = all(torch.equal(expected[name], found[name]) for name in expected)
    used = unless(again.resumed_at == blobs[1][0], f"resumed at {again.resumed_at}, not {blobs[1][0]}")
    return Found() + used + unless(same, "other weights than undisturbed")


# -- images


def file_of(image: Any, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@cache
def samples() -> list[bytes]:
    """A file of each kind, of random pixels."""
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    files = [file_of(image, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")]
    return [
        *files,
        file_of(image, "JPEG", exif=exif, progressive=True),
        file_of(image, "TIFF", compression="tiff_lzw"),
    ]


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip, overwrite, cut or splice, as bad disks and hostile users do."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        place = int(rng.integers(len(changed)))
        match rng.integers(4):
            case 0:
                changed[place] ^= 1 << int(rng.integers(8))
            case 1:
                changed[place : place + 4] = rng.bytes(4)
            case 2:
                del changed[place : place + int(rng.integers(1, 20))]
            case _:
                changed[place:place] = bytes(changed[:8])
        if not changed:
            break
    return bytes(
        changed[: int(rng.integers(1, len(changed) + 1))] if changed and rng.random() < 0.1 else changed
    )


def account(data: bytes) -> bool:
    """True if it decodes to the geometry asked, False if it is rejected; anything else is raised."""
    try:
        pixels = decode(data, DecodePath(16, 16, 3), limits=Limits(max_pixels=1_000_000)).pixels
    except Rejected:
        return False
    assert pixels.shape == (3, 16, 16)
    return True


def mutated(seed: int, folder: Path, shared: Path) -> Found:
    """Each decodes or is rejected; a native decoder that takes the process with it ends the batch."""
    warnings.simplefilter("ignore")  # broken metadata is told of, and decoded
    rng, files = np.random.default_rng(seed), samples()
    decoded = 0
    for i in range(MUTATIONS):
        decoded += account(mutate(files[i % len(files)], rng))
    return Found(trials=MUTATIONS) + unless(0 < decoded < MUTATIONS, f"{decoded} of {MUTATIONS} decoded")


IMPORTS = ("tests.test_tables", "data.upkeep", "vae.train", "vae.bundle", "flows.fitting", "PIL.Image")
EXPERIMENTS = (
    Experiment(
        "a bit flipped in a table",
        "Found and named by `tables verify` and by readers; never read as numbers.",
        goal=10_000,
        batch=table_rot,
        prepare=prepare,
        imports=IMPORTS,
    ),
    Experiment(
        "a bit flipped in a model",
        "The bundle is refused, and says which file differs.",
        goal=10_000,
        batch=bundle_rot,
        prepare=prepare,
        imports=IMPORTS,
    ),
    Experiment(
        "a bit flipped in the newest checkpoint",
        "Never used; training goes on from the one before it, to bitwise the same weights.",
        goal=200,
        batch=checkpoint_rot,
        prepare=prepare,
        imports=IMPORTS,
    ),
    Experiment(
        "a mutated image",
        "Decoded or rejected with its code, within the caps of pixels and time; no process dies of it.",
        goal=100_000,
        batch=mutated,
        imports=IMPORTS,
    ),
)
