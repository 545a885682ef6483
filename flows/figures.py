"""Pictures made of images, uint8 (N, C, H, W): PNG grids for people's tools, WebP sheets for the page."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image

SHORTEST_SIDE = 48  # pixels that an image of a grid gets at least, so that digits of 8 x 8 can be seen


def grid(images: np.ndarray, columns: int | None = None) -> bytes:
    """A PNG of images, uint8 (N, C, H, W), in rows of `columns`, by default a square; small ones enlarged.

    >>> Image.open(io.BytesIO(grid(np.zeros((6, 1, 8, 8), np.uint8), columns=3))).size
    (150, 100)
    """
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows, scale = math.ceil(count / columns), max(1, math.ceil(SHORTEST_SIDE / min(height, width)))
    # A white line a pixel wide around each, and white where the last row ends early.
    cells = np.full((rows * columns, channels, height * scale + 2, width * scale + 2), 255, np.uint8)
    cells[:count, :, 1:-1, 1:-1] = images.repeat(scale, 2).repeat(scale, 3)
    page = cells.reshape(rows, columns, *cells.shape[1:]).transpose(0, 3, 1, 4, 2)
    page = page.reshape(rows * cells.shape[2], columns * cells.shape[3], channels)
    buffer = io.BytesIO()
    Image.fromarray(page[:, :, 0] if channels == 1 else page).save(buffer, "PNG")
    return buffer.getvalue()


def shrink(images: np.ndarray, side: int) -> np.ndarray:
    """The images with no side longer than that; smaller ones as they are.

    >>> shrink(np.zeros((2, 3, 100, 50), np.uint8), 20).shape
    (2, 3, 20, 10)
    """
    height, width = images.shape[2:]
    scale = side / max(height, width)
    if scale >= 1:
        return images
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = [Image.fromarray(_plane(image)).resize(size, Image.Resampling.BOX) for image in images]
    return np.stack([np.atleast_3d(np.asarray(image)).transpose(2, 0, 1) for image in small])


def tile(images: np.ndarray, columns: int, gap: int = 0) -> np.ndarray:
    """One picture (H, W, C + 1), its last channel opaque where an image is; `gap` transparent pixels between.

    >>> tile(np.zeros((3, 1, 8, 8), np.uint8), columns=2, gap=1).shape
    (17, 17, 2)
    """
    count, channels, height, width = images.shape
    rows = math.ceil(count / columns)
    page = np.zeros((rows * (height + gap), columns * (width + gap), channels + 1), np.uint8)
    for place, image in enumerate(images):
        top, left = place // columns * (height + gap), place % columns * (width + gap)
        page[top : top + height, left : left + width, :channels] = image.transpose(1, 2, 0)
        page[top : top + height, left : left + width, channels] = 255
    return page[: rows * (height + gap) - gap, : columns * (width + gap) - gap]


def webp(page: np.ndarray, quality: int | None = None) -> bytes:
    """A picture (H, W, C) of grey or RGB, with or without opacity, as WebP: to the bit without a quality."""
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[page.shape[2]]
    image = Image.fromarray(page[:, :, 0] if mode == "L" else page, mode)
    buffer = io.BytesIO()
    if quality is None:
        image.save(buffer, "WEBP", lossless=True, method=3)
    else:
        image.save(buffer, "WEBP", quality=quality, method=3)
    return buffer.getvalue()


def _plane(image: np.ndarray) -> np.ndarray:
    """An image (C, H, W) as Pillow takes it."""
    return image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
