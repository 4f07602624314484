"""Encoded images to pixels: what is taken, how it looks afterwards, what is refused in which words."""

import io
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mtlora.vision.image_input import ImageInput
from mtlora.vision.images import Header, ImageError, ImageLimits, decode, held_pixels, prepare, read_header
from tests.mtlora.vision.pictures import (
    SVG,
    animated,
    bomb,
    encoded,
    jpeg_bomb,
    many_scans,
    photograph,
    webp_bomb,
)

MEAN, STD = (0.5, 0.25, 0.75), (0.5, 0.25, 0.125)
SMALL = ImageLimits(max_bytes=100_000, max_pixels=10_000)
SEEDS = [
    encoded(photograph()),
    encoded(photograph().convert("P")),
    encoded(photograph().convert("RGBA")),
    encoded(photograph(), "JPEG"),
    encoded(photograph(), "JPEG", progressive=True),
    encoded(photograph().convert("CMYK"), "JPEG"),
    encoded(photograph(), "WEBP"),
    encoded(photograph(), "WEBP", lossless=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"),
]


def spec(size: int = 16, resize: Any = "squash", **more: Any) -> ImageInput:
    return ImageInput(size=size, resize=resize, **more)


def close(one: Any, other: Any, most: float = 6) -> bool:
    return bool(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).mean() < most)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("WEBP", {"quality": 95}), ("JPEG", {"quality": 95})],
)
def test_each_format_decodes_to_its_pixels(kind: str, options: Any) -> None:
    data = encoded(photograph(), kind, **options)

    header = read_header(data)

    assert (header.width, header.height) == (40, 30)
    assert close(decode(data), photograph())
    assert decode(data).dtype == np.uint8


def test_a_palette_grey_and_one_bit_become_three_channels() -> None:
    for mode in ("P", "L", "1"):
        image = photograph().convert(mode)
        assert np.array_equal(decode(encoded(image)), np.asarray(image.convert("RGB")))


def test_cmyk_is_converted() -> None:
    assert close(decode(encoded(photograph().convert("CMYK"), "JPEG", quality=95)), photograph())


def test_of_sixteen_bits_the_upper_eight_count() -> None:
    values_HW = (np.arange(30 * 40).reshape(30, 40) * 54).astype(np.uint16)

    pixels_HWC = decode(encoded(Image.fromarray(values_HW)))

    assert np.array_equal(pixels_HWC, np.repeat((values_HW >> 8).astype(np.uint8)[..., None], 3, axis=-1))


def test_a_transparent_grey_of_sixteen_bits_becomes_white() -> None:
    grey = Image.fromarray(np.array([[0x1234, 0x8000]], np.uint16))
    data = encoded(grey, transparency=0x1234)
    assert Image.open(io.BytesIO(data)).info["transparency"] == 0x1234
    assert decode(data)[0].tolist() == [[255, 255, 255], [0x80, 0x80, 0x80]]


def test_alpha_is_composed_over_white() -> None:
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    half = Image.new("LA", (4, 4), (0, 128))
    palette = Image.new("P", (4, 4))
    palette.putpalette([10, 20, 30])

    assert (decode(encoded(clear)) == 255).all()
    assert (np.abs(decode(encoded(half)).astype(int) - 127) <= 1).all()
    assert (decode(encoded(palette, transparency=0)) == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_honoured(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photograph(), kind, exif=exif.tobytes())
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))

    assert np.array_equal(decode(data), expected)


def test_broken_metadata_are_passed_over() -> None:
    data = encoded(photograph(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")

    assert close(decode(data), photograph())


def test_large_jpegs_are_decoded_smaller_and_look_alike() -> None:
    data = encoded(photograph(1600, 1200), "JPEG", quality=95)

    reduced_HWC = decode(data, size=100)

    # Two times the side are left.
    assert reduced_HWC.shape == (300, 400, 3)
    whole_CSS, reduced_CSS = (prepare(each, spec(100), MEAN, STD) for each in (decode(data), reduced_HWC))
    assert np.abs(whole_CSS - reduced_CSS).max() < 0.1


@pytest.mark.parametrize(
    ("header", "held"),
    [
        (Header("JPEG", 448, 600), 448 * 300),
        (Header("JPEG", 447, 600), 447 * 600),
        (Header("PNG", 4000, 3000), 4000 * 3000),
    ],
)
def test_a_jpeg_that_is_decoded_smaller_holds_half_of_its_pixels(header: Header, held: int) -> None:
    assert held_pixels(header, 112) == held
    if header.format == "JPEG":
        picture = photograph(header.width, header.height)
        shape = decode(encoded(picture, "JPEG"), size=112).shape
        assert (shape[0] * shape[1] < header.pixels) is (held < header.pixels)


def test_prepare_normalises() -> None:
    grey_HWC = np.full((30, 40, 3), 51, np.uint8)

    x_CSS = prepare(grey_HWC, spec(), MEAN, STD)

    assert x_CSS.shape == (3, 16, 16)
    assert x_CSS.dtype == np.float32
    for channel in range(3):
        assert np.allclose(x_CSS[channel], (0.2 - MEAN[channel]) / STD[channel], atol=1e-6)
    own = prepare(grey_HWC, spec(mean=(0.2,) * 3, std=(1.0,) * 3), MEAN, STD)
    assert np.allclose(own, 0, atol=1e-6)


def test_crop_takes_the_middle_and_pad_keeps_all() -> None:
    bars_HWC = np.zeros((20, 60, 3), np.uint8)
    bars_HWC[:, 20:40] = 255

    cropped, padded = (prepare(bars_HWC, spec(12, how), (0.0,) * 3, (1.0,) * 3) for how in ("crop", "pad"))

    assert (cropped[:, :, 2:-2] > 0.9).all()
    assert (padded[:, :4] == 0).all()
    assert (padded[:, 8:] == 0).all()
    assert (padded[:, 5:7, 5:7] > 0.9).all()


@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    size=st.integers(8, 40),
    resize=st.sampled_from(["crop", "pad", "squash"]),
)
def test_prepare_takes_any_size(width: int, height: int, size: int, resize: str) -> None:
    x_CSS = prepare(np.full((height, width, 3), 255, np.uint8), spec(size, resize), (0.0,) * 3, (1.0,) * 3)

    assert x_CSS.shape == (3, size, size)
    assert x_CSS.max() == pytest.approx(1.0)
    assert np.isfinite(x_CSS).all()


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "no bytes"),
        (b"hello, what is in this picture?", "bytes of an unknown format"),
        (SVG, "an SVG"),
        (b"<svg width='5'/>", "an SVG"),
        (encoded(photograph(), "GIF"), "a GIF"),
        (encoded(photograph(), "BMP"), "a BMP"),
        (encoded(photograph(), "TIFF"), "a TIFF"),
        (encoded(photograph(), "AVIF"), "an AVIF"),
        (animated("PNG"), "2 frames"),
        (animated("WEBP"), "an animated WebP"),
        (bomb(), "50000 x 50000 pixels"),
        (jpeg_bomb(), "65535 x 65535 pixels"),
        (webp_bomb(), "16384 x 16384 pixels"),
        (bomb(0, 9), "0 x 9 pixels"),
        (encoded(photograph(), "JPEG")[:-300], "a JPEG that cannot be decoded"),
        (encoded(photograph())[:-40], "a PNG that cannot be decoded"),
        (encoded(photograph(), "WEBP")[:-20], "a WebP that cannot be decoded"),
        (encoded(photograph(), "JPEG")[:100], "a JPEG without dimensions"),
        (b"\xff\xd8\xff\xe0\0", "the file ends inside its header"),
        (b"\xff\xd8\xff" + b"\xe0\0\2\xff" * 10_000, "a JPEG without dimensions"),
        (many_scans(200), "scans"),
        (bytes((16 << 20) + 1), "16777217 bytes"),
    ],
)
def test_what_is_refused_is_named(data: bytes, found: str) -> None:
    with pytest.raises(ImageError, match="found") as caught:
        decode(data)

    assert found in str(caught.value)
    assert "allowed" in str(caught.value)


def test_a_few_more_scans_are_taken() -> None:
    assert close(decode(many_scans(10)), photograph())


@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF....WEBPVP8X", b"RIFF....WEBPVP8 "]),
)
def test_any_bytes_are_refused_or_within_the_limits(data: bytes, begin: bytes) -> None:
    try:
        header = read_header(begin + data, SMALL)
    except ImageError:
        return
    assert 1 <= header.pixels <= SMALL.max_pixels


@given(seed=st.sampled_from(range(len(SEEDS))), rng=st.randoms(use_true_random=False))
def test_a_mutated_image_is_decoded_or_refused(seed: int, rng: random.Random) -> None:
    data = bytearray(SEEDS[seed])
    for _ in range(rng.randrange(1, 8)):
        at = rng.randrange(len(data))
        match rng.randrange(3):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                del data[at : at + rng.randrange(1, 30)]
            case _:
                data[at:at] = rng.randbytes(rng.randrange(1, 30))
        if not data:
            return
    try:
        pixels_HWC = decode(bytes(data), SMALL, size=8)
    except ImageError:
        return
    assert pixels_HWC.shape[2] == 3
    assert pixels_HWC.size <= 3 * SMALL.max_pixels
