"""Decodes an image into an encoder's input pixels, for trainer, evaluation and server.

Files are untrusted. An image is decoded only after its header's dimensions have passed the limits.

| property of a file | result |
| --- | --- |
| orientation in EXIF or XMP | honoured; unreadable metadata is ignored |
| alpha, a transparent colour of a palette | composed over white |
| palette, grey, one bit | three channels |
| 16 bits a channel | the upper 8 |
| CMYK | converted without colour profiles; so are all images |
| a preview or gain map behind a JPEG | ignored |
| several frames | refused |

H: height, W: width, C: the three colours red, green, blue, S: side of an encoder's square input, in pixels.
"""

import io
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from mtlora.errors import MtLoRAError
from mtlora.vision.image_input import ImagePreparation

FORMATS = ("PNG", "JPEG", "WebP")
# A larger JPEG is decoded at a half, a quarter or an eighth of its size, if its sides keep this many times S.
_SPARE = 2
# Most scans of a progressive JPEG: each goes over the whole image. Encoders write a dozen; a small hostile file may
# have very many.
_MAX_SCANS = 100
# Most segments before a JPEG's dimensions. Cameras write a dozen.
_MAX_SEGMENTS = 512
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# First bytes of other file formats, to name them in errors.
_OTHERS = (
    (b"GIF8", "a GIF"),
    (b"BM", "a BMP"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"%PDF", "a PDF"),
    (b"\0\0\1\0", "an ICO"),
    (b"8BPS", "a PSD"),
    (b"\xff\x0a", "a JPEG XL"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000"),
)

# Pillow's warnings quote the file's metadata; keep them out of the server's stderr.
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageError(MtLoRAError):
    """An image that is refused; the message says what was found and what is allowed."""


class FormatError(ImageError):
    """A file of another format; `found` names it."""

    def __init__(self, found: str, allowed: Sequence[str] = FORMATS) -> None:
        super().__init__(f"found {found}; allowed: {', '.join(allowed)}")
        self.found = found


@dataclass(frozen=True)
class ImageLimits:
    """Limits of an encoded image: bytes of the file, and pixels before any reduction."""

    max_bytes: int = 16 << 20
    max_pixels: int = 25_000_000


LIMITS = ImageLimits()


@dataclass(frozen=True)
class Header:
    """A file's format (one of FORMATS) and its size in pixels, from its header."""

    format: str
    width: int
    height: int

    @property
    def pixels(self) -> int:
        return self.width * self.height


def read_header(data: bytes, limits: ImageLimits = LIMITS) -> Header:
    """The header of an encoded image, held to the limits; decodes nothing. Raises ImageError."""
    if len(data) > limits.max_bytes:
        raise ImageError(f"found {len(data)} bytes; allowed: up to {limits.max_bytes}")
    try:
        header = _header(data)
    except (struct.error, IndexError):
        raise ImageError(
            f"found {len(data)} bytes: the file ends inside its header; allowed: a complete file"
        ) from None
    if not 1 <= header.pixels <= limits.max_pixels:
        found = f"found {header.width} x {header.height} pixels"
        raise ImageError(f"{found}; allowed: 1 to {limits.max_pixels} in all")
    return header


def held_pixels(header: Header, size: int) -> int:
    """Pixels that are in memory while an image is decoded for an input of a size.

    A JPEG that is decoded at reduced size needs memory for its coefficients: at most half that of its pixels.
    """
    reduced = header.format == "JPEG" and min(header.width, header.height) >= 2 * _SPARE * size
    return header.pixels // 2 if reduced else header.pixels


def decode(data: bytes, limits: ImageLimits = LIMITS, *, size: int | None = None) -> NDArray[np.uint8]:
    """The pixels of an encoded image, [H, W, 3]. Raises ImageError.

    size: S of the encoder's input; a much larger JPEG is decoded at reduced size, which is much faster.
    """
    header = read_header(data, limits)
    if header.format == "JPEG" and (scans := data.count(b"\xff\xda")) > _MAX_SCANS:
        raise ImageError(f"found a JPEG of {scans} scans; allowed: up to {_MAX_SCANS}")
    try:
        return np.asarray(_decoded(data, header, size))
    except (ImageError, MemoryError):
        raise
    # Pillow's parsers may raise any exception.
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ImageError(f"found a {header.format} that cannot be decoded: {reason}; allowed: a whole file") from None


def prepare(
    pixels_HWC: NDArray[np.uint8], spec: ImagePreparation, mean: Sequence[float], std: Sequence[float]
) -> NDArray[np.float32]:
    """An image as the encoder's input, [3, S, S]: resized with antialiasing, values in 0 to 1, minus mean, over std.

    spec: the task's; its own mean and std, if set, replace the backbone's. Padding has the mean's colour.
    """
    size = spec.size
    image = Image.fromarray(pixels_HWC)
    width, height = image.size
    box, inner = (0.0, 0.0, float(width), float(height)), (size, size)
    if spec.resize == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    elif spec.resize == "pad":
        longest = max(width, height)
        inner = (max(1, round(width * size / longest)), max(1, round(height * size / longest)))
    resized_HWC = np.asarray(image.resize(inner, Image.Resampling.BICUBIC, box), np.float32) / 255
    inner_HWC = (resized_HWC - np.asarray(spec.mean or mean, np.float32)) / np.asarray(spec.std or std, np.float32)
    x_CSS = np.zeros((3, size, size), np.float32)
    left, top = (size - inner[0]) // 2, (size - inner[1]) // 2
    x_CSS[:, top : top + inner[1], left : left + inner[0]] = inner_HWC.transpose(2, 0, 1)
    return x_CSS


def _decoded(data: bytes, header: Header, size: int | None) -> Image.Image:
    image = _open(data, header)
    if getattr(image, "is_animated", False):
        raise ImageError(f"found {getattr(image, 'n_frames', 0)} frames; allowed: 1")
    if size is not None:
        image.draft(None, (_SPARE * size, _SPARE * size))
    return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """An opened image, loaded, in three channels, turned as its metadata say. Raises any exception."""
    image.load()
    orientation = _orientation(image)
    rgb = _rgb(image)
    return rgb.transpose(_TURNS[orientation]) if orientation in _TURNS else rgb


def _open(data: bytes, header: Header) -> Image.Image:
    """Open a file by the plugin of its format: Pillow's own `open` would try others, and split off what follows."""
    plugins: dict[str, Callable[[io.BytesIO], Image.Image]] = {
        "PNG": PngImagePlugin.PngImageFile,
        "JPEG": JpegImagePlugin.JpegImageFile,
        "WebP": WebPImagePlugin.WebPImageFile,
    }
    image = plugins[header.format](io.BytesIO(data))
    if image.size != (header.width, header.height):
        raise ImageError(f"found two sizes, {header.width} x {header.height} and {image.size[0]} x {image.size[1]}")
    return image


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION)
    # Ignore broken metadata: the pixels may be good.
    except Exception:
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        grey_HW = np.asarray(image).astype(np.uint32)
        upper_HW = (grey_HW >> 8).astype(np.uint8)
        if (transparent := image.info.get("transparency")) is not None:
            upper_HW[grey_HW == transparent] = 255
        return Image.fromarray(upper_HW).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _header(data: bytes) -> Header:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        kind, width, height = struct.unpack_from(">4sII", data, 12)
        if kind != b"IHDR":
            raise ImageError("found a PNG that does not begin with IHDR; allowed: a whole file")
        return Header("PNG", width, height)
    if data.startswith(b"\xff\xd8\xff"):
        return Header("JPEG", *_jpeg_size(data))
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return Header("WebP", *_webp_size(data))
    raise FormatError(_named(data))


def _named(data: bytes) -> str:
    """The format of a refused file, for the message."""
    if not data:
        return "no bytes"
    for magic, name in _OTHERS:
        if data.startswith(magic):
            return name
    if data[4:8] == b"ftyp":
        return "an AVIF" if data[8:12] in (b"avif", b"avis") else "a HEIC, or a video"
    begin = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if begin.startswith((b"<svg", b"<?xml", b"<!doctype svg")) and b"<svg" in begin:
        return "an SVG"
    return "bytes of an unknown format"


def _jpeg_size(data: bytes) -> tuple[int, int]:
    for kind, at in _jpeg_segments(data):
        # Start-of-frame markers; three markers in this range have another meaning.
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 3)
            return width, height
        if kind in (0xD9, 0xDA):
            break
    raise ImageError("found a JPEG without dimensions; allowed: a whole file")


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """(marker, offset of its length) of the segments."""
    at = 2
    for _ in range(_MAX_SEGMENTS):
        at = data.find(b"\xff", at)
        if at < 0:
            return
        while data[at] == 0xFF:
            at += 1
        yield data[at], at + 1
        # Skip a stuffed byte, and markers without a segment.
        if data[at] in (0x00, 0x01) or 0xD0 <= data[at] <= 0xD8:
            at += 1
        else:
            at += 1 + max(2, struct.unpack_from(">H", data, at + 1)[0])


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        if data[20] & 0x02:
            raise ImageError("found an animated WebP; allowed: 1 frame")
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ImageError("found a WebP without dimensions; allowed: a whole file")
