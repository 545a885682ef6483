"""The decode path: each kind of file in its documented form, or a reject with its code."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data import images
from data.images import DecodePath, Limits, Rejected, decode, fit_pixels
from tests.faults.rot import account, file_of, mutate

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # broken metadata is told of, and decoded

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (24, 32, 3), np.uint8)
GREY = COLOUR[:, :, 0]
NATIVE = DecodePath(24, 32, 3)


def rgb(data: bytes, path: DecodePath = NATIVE) -> np.ndarray:
    return decode(data, path).pixels.transpose(1, 2, 0)


def code(data: bytes, name: str = "", limits: Limits = Limits()) -> str:  # noqa: B008
    with pytest.raises(Rejected) as caught:
        decode(data, NATIVE, name=name, limits=limits)
    return caught.value.reject.error


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_keep_every_pixel(kind: str) -> None:
    assert np.array_equal(rgb(file_of(Image.fromarray(COLOUR), kind)), COLOUR)


def test_webp_lossless() -> None:
    assert np.array_equal(rgb(file_of(Image.fromarray(COLOUR), "WEBP", lossless=True)), COLOUR)


def test_jpeg_is_as_pillow_decodes_it() -> None:
    data = file_of(Image.fromarray(COLOUR), "JPEG")
    assert np.array_equal(rgb(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpegs_are_scaled_as_pillows_draft_does(orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    smooth = Image.fromarray(COLOUR).resize((1000, 700), Image.Resampling.BICUBIC)
    data = file_of(smooth, "JPEG", exif=exif, quality=95)
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (128, 128))
    assert image.size == (250, 175)
    upright = ImageOps.exif_transpose(image)
    expected = np.asarray(ImageOps.fit(upright, (64, 64), Image.Resampling.BILINEAR))
    decoded = decode(data, DecodePath(64, 64, 3))
    assert np.array_equal(decoded.pixels.transpose(1, 2, 0), expected)
    assert (decoded.width, decoded.height) == ((1000, 700) if orientation == 1 else (700, 1000))
    full = decode(data, DecodePath(64, 64, 3, scaled_jpeg=False)).pixels
    assert np.abs(full.astype(int) - decoded.pixels).mean() < 2


def test_default_path_is_pillows_own_fit() -> None:
    image = Image.fromarray(RNG.integers(0, 256, (300, 421, 3), np.uint8))
    expected = np.asarray(ImageOps.fit(image, (64, 48), Image.Resampling.BILINEAR))
    assert np.array_equal(rgb(file_of(image, "PNG"), DecodePath(48, 64, 3)), expected)


def test_grey_is_repeated_and_colour_becomes_luma() -> None:
    assert np.array_equal(rgb(file_of(Image.fromarray(GREY), "PNG")), np.repeat(GREY[..., None], 3, 2))
    luma = decode(file_of(Image.fromarray(COLOUR), "PNG"), DecodePath(24, 32, 1)).pixels[0]
    weighted = COLOUR @ np.array([0.299, 0.587, 0.114])
    assert np.abs(luma - weighted).max() <= 0.51


def test_16_bit_grey_keeps_the_high_byte() -> None:
    deep = (GREY.astype(np.uint16) << 8) | 0x7F
    for kind in ("PNG", "TIFF"):
        data = file_of(Image.fromarray(deep), kind)
        assert np.array_equal(decode(data, DecodePath(24, 32, 1)).pixels[0], GREY)


def test_16_bit_pgm() -> None:
    data = b"P5 32 24 65535\n" + (GREY.astype(">u2") << 8).astype(">u2").tobytes()
    assert np.array_equal(decode(data, DecodePath(24, 32, 1)).pixels[0], GREY)


def test_palette_bilevel_and_cmyk() -> None:
    palette = Image.fromarray(COLOUR).quantize(16)
    assert np.array_equal(rgb(file_of(palette, "PNG")), np.asarray(palette.convert("RGB")))
    bilevel = Image.fromarray(GREY).convert("1")
    assert np.array_equal(rgb(file_of(bilevel, "PNG"))[:, :, 0], np.asarray(bilevel) * np.uint8(255))
    data = file_of(Image.fromarray(COLOUR).convert("CMYK"), "JPEG")
    assert np.array_equal(rgb(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_alpha_is_composited_over_white() -> None:
    alpha = np.full((24, 32, 1), 255, np.uint8)
    alpha[:, 16:] = 0
    pixels = rgb(file_of(Image.fromarray(np.concatenate([COLOUR, alpha], 2)), "PNG"))
    assert np.array_equal(pixels[:, :16], COLOUR[:, :16])
    assert (pixels[:, 16:] == 255).all()


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_is_white(mode: str) -> None:
    image = Image.new(mode, (32, 24), 0)
    data = file_of(image, "PNG", transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert (rgb(data) == 255).all()


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (32, 24), (i * 80, 0, 0)) for i in range(3)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        data = file_of(frames[0], kind, save_all=True, append_images=frames[1:])
        assert rgb(data).max() == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    image = Image.new("RGB", (40, 20))
    image.paste((250, 250, 250), (0, 0, 20, 10))  # bright top left corner as stored
    exif = Image.Exif()
    exif[274] = orientation
    decoded = decode(file_of(image, kind, exif=exif), DecodePath(20, 20, 1, fit="stretch"))
    corner = [0, 1, 2, 3][[0, 0, 1, 3, 2, 0, 1, 3, 2][orientation]]  # 0 tl 1 tr 2 bl 3 br, once upright
    quarters = decoded.pixels[0].reshape(2, 10, 2, 10).mean((1, 3)).reshape(-1)
    assert quarters.argmax() == corner
    assert (decoded.width, decoded.height) == ((40, 20) if orientation < 5 else (20, 40))


def test_orientation_survives_conversion() -> None:
    exif = Image.Exif()
    exif[274] = 6
    deep = Image.fromarray(np.full((20, 40), 256 * 9, np.uint16))
    clear = Image.new("RGBA", (40, 20))
    for data in (
        file_of(deep, "PNG", exif=exif),
        file_of(clear, "PNG", exif=exif),
        file_of(clear, "TIFF", exif=exif),
        file_of(Image.new("CMYK", (40, 20)), "TIFF", exif=exif),
        file_of(Image.new("P", (40, 20)), "PNG", exif=exif),
    ):
        image = decode(data, NATIVE)
        assert (image.width, image.height) == (20, 40)


def test_pad_and_stretch() -> None:
    data = file_of(Image.new("RGB", (40, 20), (200, 0, 0)), "PNG")
    padded = rgb(data, DecodePath(40, 40, 3, fit="pad"))
    assert (padded[:10] == 0).all()
    assert (padded[10:30, :, 0] == 200).all()
    assert (rgb(data, DecodePath(40, 40, 3, fit="stretch"))[..., 0] == 200).all()


def test_downsizing_is_antialiased() -> None:
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    small = decode(file_of(Image.fromarray(stripes), "PNG"), DecodePath(8, 8, 1)).pixels
    assert abs(float(small.mean()) - 127.5) < 2
    assert small.std() < 12  # nearest neighbour would give 0 and 255


def test_array_sources_take_the_same_path() -> None:
    path = DecodePath(11, 13, 3)
    assert np.array_equal(
        fit_pixels(COLOUR, path).pixels, decode(file_of(Image.fromarray(COLOUR), "PNG"), path).pixels
    )
    assert np.array_equal(fit_pixels(GREY[..., None], DecodePath(24, 32, 1)).pixels[0], GREY)


def test_reject_codes() -> None:
    png, jpeg = file_of(Image.fromarray(COLOUR), "PNG"), file_of(Image.fromarray(COLOUR), "JPEG")
    assert code(b"") == "empty"
    assert code(b"hello, world") == "not_an_image"
    assert code(b"%PDF-1.7 " * 10, "a.jpg") == "not_an_image"
    assert code(png, "a.jpg") == "wrong_extension"
    assert code(png[: len(png) // 2]) == "truncated"
    assert code(jpeg[: len(jpeg) // 2]) == "truncated"
    assert code(png[:16] + b"\x00" * 40 + png[56:]) == "corrupt"
    assert code(file_of(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")) == "unsupported_mode"
    assert code(file_of(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "TIFF")) == "unsupported_mode"
    assert code(png, limits=Limits(max_bytes=100)) == "too_many_bytes"
    assert code(png, limits=Limits(max_pixels=100)) == "too_many_pixels"


def test_a_bomb_is_refused_from_its_header() -> None:
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert code(bomb + struct.pack(">I", 9) + b"IDAT" + b"\x00" * 64) == "too_many_pixels"


def test_good_names_pass() -> None:
    jpeg = file_of(Image.fromarray(COLOUR), "JPEG")
    for name in ("a/b.jpg", "b.JPEG", "no_extension", "c.data", "ends.in.dot."):
        decode(jpeg, NATIVE, name=name)


@pytest.mark.parametrize(
    "bad", [{"height": 0}, {"width": 99999}, {"channels": 2}, {"resize": "nearest"}, {"fit": "fill"}]
)
def test_bad_paths(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        DecodePath(**bad)


def test_paths_round_trip_and_digests_differ() -> None:
    paths = [DecodePath(8, 8, 1), DecodePath(8, 8, 3), DecodePath(8, 9, 1), DecodePath(8, 8, 1, "box")]
    assert [DecodePath.from_dict(path.to_dict()) for path in paths] == paths
    assert len({path.digest for path in paths}) == len(paths)
    with pytest.raises(ValueError, match="unknown field 'size'"):
        DecodePath.from_dict({"size": 8})
    with pytest.raises(ValueError, match="geometry is open"):
        DecodePath().geometry  # noqa: B018


def test_opencv_gives_pillows_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On whole and mutated files alike: the same pixels, or the same reject."""
    big = Image.fromarray(COLOUR).resize((77, 51))
    whole = [file_of(big, "PNG"), file_of(Image.fromarray(GREY), "PNG"), file_of(big.quantize(9), "PNG")]
    rng = np.random.default_rng(3)
    files = [*whole, *(mutate(whole[i % len(whole)], rng) for i in range(1_000))]
    fast = [outcome(data) for data in files]
    assert images.fast_png(whole[0]) is not None
    monkeypatch.setattr(images, "_opencv", lambda: None)
    assert [outcome(data) for data in files] == fast


def outcome(data: bytes) -> bytes | str:
    try:
        return decode(data, DecodePath(51, 77, 3)).pixels.tobytes()
    except Rejected as error:
        return error.reject.error


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_never_crash(data: bytes) -> None:
    account(data)
    account(b"\x89PNG\r\n\x1a\n" + data)


def test_many_images_hash_as_each_of_them() -> None:
    several = RNG.integers(0, 256, (5, 4, 3, 1), dtype=np.uint8)
    assert images.pixel_hashes(several) == [images.pixel_hash(image) for image in several]
    assert images.pixel_hash(several[0]) != images.pixel_hash(several[0].reshape(3, 4, 1))
    assert images.pixel_hashes(several[:0]) == []


def test_a_decoder_that_cannot_be_loaded_is_no_images_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no more files can be opened: a reject would stay in the table."""
    monkeypatch.setattr(Image, "OPEN", {})

    def refused() -> None:
        raise PermissionError("GifImagePlugin.py")

    monkeypatch.setattr(Image, "init", refused)
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "GIF")
    with pytest.raises(PermissionError, match="GifImagePlugin"):
        decode(file.getvalue(), DecodePath(8, 8, 1))
