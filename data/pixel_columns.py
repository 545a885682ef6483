"""Arrow columns of pixels, as arrays: fixed-shape tensors and nested lists of uint8.

That is how Arrow's canonical tensors, Hugging Face's `Array2D` and `Array3D`, and `ndarray.tolist()` store
images in Parquet.

Legend: N images, H W pixels, C channels.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.images import Reject

CHANNELS = (1, 3)


def holds_pixels(kind: pa.DataType) -> bool:
    """Whether a column of this type has images as arrays of 2 or 3 dimensions.

    >>> holds_pixels(pa.list_(pa.list_(pa.uint8()))), holds_pixels(pa.list_(pa.uint8()))
    (True, False)
    >>> holds_pixels(pa.fixed_shape_tensor(pa.uint8(), (28, 28)))
    True
    """
    if isinstance(kind, pa.FixedShapeTensorType):
        return bool(kind.value_type == pa.uint8()) and len(kind.shape) in (2, 3)
    depth, values = _nested(kind)
    return bool(values == pa.uint8()) and depth in (2, 3)


def images_of(column: pa.Array) -> np.ndarray | list[np.ndarray | Reject]:
    """A column's images, uint8 (N, H, W, C); where they differ in shape or some are none, one by one.

    Channels are the last dimension, or the first where only that has 1 or 3.

    >>> images_of(pa.array([[[1, 2]], [[3, 4]]], pa.list_(pa.list_(pa.uint8())))).shape
    (2, 1, 2, 1)
    >>> images_of(pa.array([[[1, 2]], None, [[3], []]], pa.list_(pa.list_(pa.uint8()))))[2].error
    'corrupt'
    """
    whole = _array(column)
    if whole is not None and _has_channels(whole):
        return _channels_last(whole)
    return [_image(column.slice(row, 1)) for row in range(len(column))]


def _image(one: pa.Array) -> np.ndarray | Reject:
    if one.null_count:
        return Reject("missing", "null in its image column", "read")
    found = _array(one)
    if found is None or not found.size:
        return Reject("corrupt", "its lists are empty, differ in length or hold nulls", "read")
    if not _has_channels(found):
        return Reject("unsupported_mode", f"shape {found.shape[1:]}: give 1 or 3 channels", "read")
    image: np.ndarray = _channels_last(found)[0]
    return image


def _array(column: pa.Array) -> np.ndarray | None:
    """(N, ...) of its values; None where they do not make an array: nulls, or lists of several lengths."""
    if column.null_count:
        return None
    if isinstance(column.type, pa.FixedShapeTensorType):
        return _tensors(column)
    if isinstance(column.type, pa.BaseExtensionType):
        return _array(column.storage)
    if column.type == pa.uint8():
        values: np.ndarray = column.to_numpy()
        return values
    inner = _array(column.flatten())
    lengths = pc.min_max(pc.list_value_length(column)).as_py()
    if inner is None or not lengths["max"] or lengths["min"] != lengths["max"]:
        return None
    return inner.reshape(len(column), lengths["max"], *inner.shape[1:])


def _tensors(column: pa.FixedShapeTensorArray) -> np.ndarray | None:
    """Of tensors, in the order of dimensions that they are meant to have.

    By hand: pyarrow 25 refuses a slice of permuted tensors ("strides must not involve buffer over run").
    """
    flat, kind = column.storage.flatten(), column.type
    if flat.null_count:
        return None
    found: np.ndarray = flat.to_numpy().reshape(len(column), *kind.shape)
    return found.transpose(0, *(1 + axis for axis in kind.permutation or range(len(kind.shape))))


def _has_channels(images: np.ndarray) -> bool:
    return images.ndim == 3 or images.shape[3] in CHANNELS or images.shape[1] in CHANNELS


def _channels_last(images: np.ndarray) -> np.ndarray:
    if images.ndim == 3:
        return images[..., None]
    return images if images.shape[3] in CHANNELS else images.transpose(0, 2, 3, 1)


def _nested(kind: pa.DataType) -> tuple[int, pa.DataType]:
    """(how deep lists are nested, what the innermost hold)."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    depth = 0
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        depth, kind = depth + 1, kind.value_type
    return depth, kind
