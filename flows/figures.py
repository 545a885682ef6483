"""Pictures made of images."""

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
