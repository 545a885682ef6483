"""Bytes to pixels by one recorded path, identical for training and encoding.

The path, in order, with Pillow:

1. the format is told from the content's first bytes: JPEG, PNG, WebP, GIF, BMP, TIFF or PNM; a name that
   promises another of these formats is a reject;
2. bytes and pixels are capped from the header, before anything is decoded;
3. the first frame of an animation is taken;
4. 16-bit grey keeps its high byte (as Pillow itself does for 16-bit colour); floats are refused;
5. transparency is composited over white; palettes, CMYK, YCbCr and 1-bit images become RGB or grey;
6. the EXIF orientation is applied;
7. a JPEG of four times the geometry or more is decoded by libjpeg at 1/2, 1/4 or 1/8, to at least twice
   the geometry (Pillow's `draft`, as in its `thumbnail`);
8. colour becomes grey by ITU-R 601 luma, or grey is repeated, as the model's channels ask;
9. an antialiased resize brings the image to the geometry: `crop` fills it and cuts the longer side
   around the centre, `pad` fits inside it on black, `stretch` ignores the aspect ratio.

Shapes: B batch, C channels, H W pixels. Pixels are uint8, in 0..255.
"""

from __future__ import annotations

import io
import json
import warnings
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, cached_property
from typing import Any, Literal, NamedTuple, get_args

import blake3
import numpy as np
from PIL import Image, ImageFile, ImageOps

FILTERS: dict[str, Image.Resampling] = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
Filter = Literal["box", "bilinear", "bicubic", "lanczos"]
Fit = Literal["crop", "pad", "stretch"]
PATH_VERSION = 1  # raised when the same settings would give other pixels

EXTENSIONS = {
    **dict.fromkeys(("jpg", "jpeg", "jpe", "jfif"), "JPEG"),
    **dict.fromkeys(("tif", "tiff"), "TIFF"),
    **dict.fromkeys(("pnm", "ppm", "pgm", "pbm"), "PPM"),
    **dict.fromkeys(("bmp", "dib"), "BMP"),
    "png": "PNG",
    "webp": "WEBP",
    "gif": "GIF",
}
# By the first two bytes: what a file of the format begins with.
SIGNATURES = {
    b"\xff\xd8": ((b"\xff\xd8\xff",), "JPEG"),
    b"\x89P": ((b"\x89PNG\r\n\x1a\n",), "PNG"),
    b"GI": ((b"GIF87a", b"GIF89a"), "GIF"),
    b"II": ((b"II*\x00",), "TIFF"),
    b"MM": ((b"MM\x00*",), "TIFF"),
    b"BM": ((b"BM",), "BMP"),
}
# A PNG header's depth, colour (grey or RGB), compression, filter and interlace; the chunks of a plain one.
_PLAIN_HEADERS = (bytes([8, 0, 0, 0, 0]), bytes([8, 2, 0, 0, 0]))
_PLAIN_CHUNKS = frozenset((b"IDAT", b"IEND", b"pHYs", b"sRGB", b"gAMA", b"cHRM", b"tIME"))
_PNG_END = b"IEND\xaeB`\x82"
ORIENTED = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # where an orientation may hide

# Pillow warns of broken metadata in files that decode well; what does not decode is a reject instead.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Reject(NamedTuple):
    """Why an image is not in the table: a stable code and a message for people."""

    error: str
    message: str
    stage: str = "decode"  # or 'list', 'read'


class Rejected(Exception):
    """Raised where one image cannot be used; its `reject` becomes a row of the reject table."""

    def __init__(self, error: str, message: str, stage: str = "decode"):
        super().__init__(f"{error}: {message}")
        self.reject = Reject(error, message, stage)


@dataclass(frozen=True)
class Limits:
    """What one image may cost: bytes as stored, pixels as its header says, seconds to decode."""

    max_bytes: int = 256 * 2**20
    max_pixels: int = 100_000_000
    max_seconds: float = 60.0


LIMITS = Limits()


@dataclass(frozen=True)
class DecodePath:
    """How stored images become pixels of one geometry; equal paths give equal pixels.

    `height`, `width` and `channels` (1 or 3) left None are the source's own, filled in by `resolved`.
    `resize` is one of box, bilinear, bicubic, lanczos (all antialiased); `fit` one of crop, pad, stretch;
    `scaled_jpeg` False decodes large JPEGs in full, at a third of the speed.
    Raises ValueError for any other value.

    >>> DecodePath(32, 32, 3).digest == DecodePath(32, 32, 3, fit="pad").digest
    False
    """

    height: int | None = None
    width: int | None = None
    channels: int | None = None
    resize: Filter = "bilinear"
    fit: Fit = "crop"
    scaled_jpeg: bool = True

    def __post_init__(self) -> None:
        for name, size in (("height", self.height), ("width", self.width)):
            if size is not None and not 1 <= size <= 16384:
                raise ValueError(f"{name} {size!r} is out of range: give 1 to 16384 pixels")
        if self.channels not in (None, 1, 3):
            raise ValueError(f"channels {self.channels!r}: give 1 (grey) or 3 (RGB)")
        if self.resize not in FILTERS:
            raise ValueError(f"unknown resize {self.resize!r}: give one of {', '.join(FILTERS)}")
        if self.fit not in get_args(Fit):
            raise ValueError(f"unknown fit {self.fit!r}: give one of {', '.join(get_args(Fit))}")

    def resolved(self, native: tuple[int, int, int]) -> DecodePath:
        """This path with what it leaves open taken from `native`, a source's (channels, height, width).

        >>> DecodePath(channels=3).resolved((1, 28, 28)).geometry
        (3, 28, 28)
        """
        channels, height, width = native
        return replace(
            self,
            height=self.height or height,
            width=self.width or width,
            channels=self.channels or channels,
        )

    @cached_property
    def geometry(self) -> tuple[int, int, int]:
        """(C, H, W) of the pixels; ValueError while one of them is open."""
        if self.height is None or self.width is None or self.channels is None:
            raise ValueError(f"the geometry is open in {self}: give height, width and channels")
        return self.channels, self.height, self.width

    @property
    def digest(self) -> str:
        """32 hex digits that name this path, recorded with the model and checked when it encodes."""
        text = json.dumps({"version": PATH_VERSION, **self.to_dict()}, sort_keys=True)
        return blake3.blake3(text.encode()).hexdigest(length=16)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DecodePath:
        """The path that `to_dict` wrote; ValueError for a field that is not one of its own."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r} of a decode path")
        return cls(**values)


class Decoded(NamedTuple):
    """One image: pixels uint8 (C, H, W) at the path's geometry; width and height as it was, upright."""

    pixels: np.ndarray
    width: int
    height: int


def decode(data: bytes, path: DecodePath, *, name: str = "", limits: Limits = LIMITS) -> Decoded:
    """Decode one stored image along `path`; `name` is only looked at for its extension.

    Raises Rejected, with one of the codes of docs/tables.md, for whatever is not a sound image.

    >>> from PIL import Image
    >>> file = io.BytesIO()
    >>> Image.new("L", (40, 20), 7).save(file, "PNG")
    >>> image = decode(file.getvalue(), DecodePath(8, 8, 1))
    >>> image.pixels.shape, int(image.pixels.max()), (image.width, image.height)
    ((1, 8, 8), 7, (40, 20))
    >>> decode(b"hello", DecodePath(8, 8, 1))
    Traceback (most recent call last):
    data.images.Rejected: not_an_image: begins with b'hello', no JPEG, PNG, WebP, GIF, BMP, TIFF or PNM
    """
    kind = _format(data, name, limits)
    if kind == "PNG" and (pixels := fast_png(data, limits)) is not None:
        return fit_pixels(pixels, path)
    opener = _opener(kind)  # a decoder that cannot be loaded is the machine's fault, not the image's
    try:
        image = opener(io.BytesIO(data), "")
        _check_size(image, limits)
        stored = image.size
        _draft(image, path)
        upright = _upright(_plain(image))
        turned = upright is not image and upright.size == image.size[::-1]
        return Decoded(_fitted(upright, path), *(stored[::-1] if turned else stored))
    except Rejected:
        raise
    except Exception as error:  # Pillow raises over a dozen types on broken files: each is this reject
        raise _broken(error, kind) from None


def fit_pixels(pixels: np.ndarray, path: DecodePath) -> Decoded:
    """Pixels uint8 (H, W, C) of an array source, brought to the path's geometry as a file's are."""
    channels, height, width = path.geometry
    if pixels.shape == (height, width, channels):
        return Decoded(pixels.transpose(2, 0, 1), width, height)
    plane = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    image = Image.fromarray(np.ascontiguousarray(plane))
    return Decoded(_fitted(image, path), *image.size)


def fast_png(data: bytes, limits: Limits = LIMITS) -> np.ndarray | None:
    """uint8 (H, W, C) of a plain PNG, by OpenCV: four times faster on small images, and the same pixels.

    Plain is 8-bit grey or RGB, not interlaced, with no chunk that changes what is shown. None for any
    other, or where OpenCV is missing or sees a fault: Pillow then decides.
    """
    opencv = _opencv()
    if opencv is None or data[24:29] not in _PLAIN_HEADERS or data[-8:] != _PNG_END:
        return None
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    if not 0 < width * height <= limits.max_pixels or not _plain_chunks(data):
        return None
    grey = data[25] == 0
    pixels = opencv.imdecode(np.frombuffer(data, np.uint8), 0 if grey else opencv.IMREAD_COLOR_RGB)
    if pixels is None or pixels.shape[:2] != (height, width):
        return None
    return pixels[..., None] if grey else pixels


def content_hash(data: bytes) -> bytes:
    """blake3 of a stored image's bytes, 16 bytes."""
    return blake3.blake3(data).digest(16)


def pixel_hash(pixels: np.ndarray) -> bytes:
    """blake3 of pixels and their shape, 16 bytes: the content hash of an image that was never a file."""
    return pixel_hashes(pixels[None])[0]


def pixel_hashes(images: np.ndarray) -> list[bytes]:
    """`pixel_hash` of each of several images of one shape (N, ...)."""
    shape, data = ",".join(map(str, images.shape[1:])).encode() + b":", images.tobytes()
    size = len(data) // max(len(images), 1)
    pieces = (data[start : start + size] for start in range(0, len(data), size or 1))
    return [blake3.blake3(shape + piece).digest(16) for piece in pieces]


def _format(data: bytes, name: str, limits: Limits) -> str:
    if not data:
        raise Rejected("empty", "0 bytes")
    if len(data) > limits.max_bytes:
        raise Rejected("too_many_bytes", f"{len(data)} bytes, over the cap of {limits.max_bytes}")
    kind = _sniff(data)
    if kind is None:
        raise Rejected("not_an_image", f"begins with {data[:8]!r}, no JPEG, PNG, WebP, GIF, BMP, TIFF or PNM")
    promised = EXTENSIONS.get(name.rpartition(".")[2].lower(), kind)
    if promised != kind:
        raise Rejected("wrong_extension", f"holds {kind} data, its name says {promised}")
    return kind


def _sniff(data: bytes) -> str | None:
    signatures, kind = SIGNATURES.get(data[:2], ((), None))
    if kind and data.startswith(signatures):
        return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3].isspace():
        return "PPM"
    return None


def _opener(kind: str) -> Callable[..., ImageFile.ImageFile]:
    """Pillow's own class for the format: no guessing among plugins, no process-wide size warning."""
    if kind not in Image.OPEN:
        Image.init()
    return Image.OPEN[kind][0]


def _draft(image: ImageFile.ImageFile, path: DecodePath) -> None:
    """Have libjpeg decode a large JPEG at 1/2, 1/4 or 1/8, still at least twice the geometry."""
    if path.scaled_jpeg and image.format in ("JPEG", "MPO"):
        side = 2 * max(path.geometry[1:])
        image.draft(image.mode, (side, side))


@cache
def _opencv() -> Any:
    """OpenCV, imported when the first PNG comes; None where it is not installed."""
    try:
        import cv2
    except ImportError:
        return None
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # rejects tell of broken files
    return cv2


def _plain_chunks(data: bytes) -> bool:
    """Whether a PNG's chunks fill it, are intact, and none changes how its pixels are shown."""
    place, size = 33, len(data)  # after the header
    while place < size:
        end = place + 8 + int.from_bytes(data[place : place + 4])
        chunk = data[place + 4 : end]
        if chunk[:4] not in _PLAIN_CHUNKS or zlib.crc32(chunk) != int.from_bytes(data[end : end + 4]):
            return False
        place = end + 4
    return place == size


def _check_size(image: Image.Image, limits: Limits) -> None:
    width, height = image.size
    if width * height > limits.max_pixels:
        raise Rejected("too_many_pixels", f"{width} x {height} pixels, over the cap of {limits.max_pixels}")


def _plain(image: Image.Image) -> Image.Image:
    """The image as mode L or RGB, 8 bits a channel, opaque."""
    mode = image.mode
    if mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if mode in ("F", "LAB", "HSV"):
        raise Rejected("unsupported_mode", f"pixels of mode {mode}: convert it to 8 or 16 bits first")
    if mode == "I" or mode.startswith("I;16"):
        return _high_byte(image)
    if image.has_transparency_data:
        colour = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return _keep_info(Image.alpha_composite(white, colour).convert("RGB"), image)
    return image.convert("L" if mode == "1" else "RGB")


def _high_byte(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise Rejected("unsupported_mode", "32-bit integer pixels: convert it to 8 or 16 bits first")
    return _keep_info(Image.fromarray((values >> 8).astype(np.uint8)), image)


def _keep_info(image: Image.Image, original: Image.Image) -> Image.Image:
    image.info = {key: value for key, value in original.info.items() if key in ORIENTED}
    if original.format == "TIFF":  # it keeps its orientation in its own tags
        image.info["exif"] = original.getexif().tobytes()
    return image


def _upright(image: Image.Image) -> Image.Image:
    if image.format == "TIFF" or any(key in image.info for key in ORIENTED):
        return ImageOps.exif_transpose(image)
    return image


def _fitted(image: Image.Image, path: DecodePath) -> np.ndarray:
    """uint8 (C, H, W) at the path's geometry."""
    channels, height, width = path.geometry
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = _resize(image, path)
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def _resize(image: Image.Image, path: DecodePath) -> Image.Image:
    size, resample = (path.width or 0, path.height or 0), FILTERS[path.resize]
    if path.fit == "crop":
        return ImageOps.fit(image, size, resample)
    if path.fit == "pad":
        return ImageOps.pad(image, size, resample)
    return image.resize(size, resample)


def _broken(error: Exception, kind: str) -> Rejected:
    message = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    short = isinstance(error, EOFError) or "truncated" in message.lower()
    return Rejected("truncated" if short else "corrupt", f"{kind}: {message}")
