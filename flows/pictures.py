"""What the drawing commands share: images or ids to latents, latents to a picture and a table."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.images import DecodePath, Rejected, decode
from data.store import open_store
from data.tables import read_latents, write_samples
from flows.config import Picture
from flows.devices import pick_device
from flows.figures import grid
from flows.jobs import digest
from flows.registry import locate
from flows.results import Drawn

if TYPE_CHECKING:
    from vae.encode import Encoder


class Studio:
    """A model at work on single images; `draw` ends every drawing command."""

    def __init__(self, config: Picture):
        self.config = config
        self.model = locate(config.model)
        self.facts = self.model.facts()

    @cached_property
    def encoder(self) -> Encoder:
        import vae
        from vae.encode import Encoder

        return Encoder(vae.load(self.model.folder), pick_device(self.config.device))

    @cached_property
    def rows(self) -> dict[str, np.ndarray]:
        """The table's latents by id."""
        ids, latents = read_latents(self.config.table)
        return dict(zip(ids, latents, strict=True))

    def pixels(self, file: str) -> np.ndarray:
        """An image file, uint8 (C, H, W), decoded as the model's own images were."""
        try:
            path = DecodePath.from_dict(self.facts["extra"]["decode"])
            return decode(Path(file).read_bytes(), path, name=file).pixels
        except (OSError, Rejected) as error:
            raise ValueError(f"image {file!r} can't be read: {error}") from error

    def latent(self, name: str) -> np.ndarray:
        """The posterior's mean (D,) of an image file, or of an id in the table."""
        if not self.config.table:
            return self.encoder.encode(self.pixels(name)[None], [name]).mu[0]
        if name in self.rows:
            return self.rows[name]
        if Path(name).is_file():
            return self.encoder.encode(self.pixels(name)[None], [name]).mu[0]
        raise ValueError(f"{name!r} is neither an id in {self.config.table} nor an image file")

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Images uint8 (N, C, H, W) of latents (N, D)."""
        from vae.edit import decode as decode_latents

        return decode_latents(self.encoder.model, latents)

    def draw(
        self, latents: np.ndarray, above: np.ndarray | None = None, notes: list[str] | None = None
    ) -> Drawn:
        """Latents (N, D) as a row of images, under those `above`; and as a table if one is wanted."""
        images = self.decode(latents)
        shown = images if above is None else np.concatenate([above, images])
        self.config.picture.parent.mkdir(parents=True, exist_ok=True)
        self.config.picture.write_bytes(grid(shown, columns=len(images)))
        table = self._write(latents, images) if self.config.out else None
        return Drawn(
            model=self.model.uri,
            picture=self.config.picture,
            images=len(shown),
            notes=notes or [],
            table=table,
            changed=True,
        )

    def _write(self, latents: np.ndarray, images: np.ndarray) -> str:
        settings: dict[str, Any] = self.config.model_dump(mode="json", exclude={"root", "picture", "out"})
        return write_samples(
            open_store(self.config.out),
            lambda indices: (latents[indices].astype(np.float32), images[indices]),
            len(images),
            name=type(self.config).__name__.lower(),
            key={"weights_sha256": self.facts["weights"], "drawing": digest(settings, latents.tolist())},
            seed=0,
            dims=latents.shape[1],
            lineage={"model": self.model.uri, "settings": settings},
        ).uri
