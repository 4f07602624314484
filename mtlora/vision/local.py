"""Images from files of this machine: what clients may send, larger, and formats that data sets are published in.

A server never decodes these for a client: it takes `FORMATS` alone.
"""

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import BmpImagePlugin, Image, PpmImagePlugin, TiffImagePlugin

from mtlora.vision.images import FORMATS, FormatError, ImageError, ImageLimits, decode, upright

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm")
LIMITS = ImageLimits(max_bytes=1 << 30, max_pixels=256_000_000)

_Plugin = Callable[[io.BytesIO], Image.Image]
_TIFF: tuple[str, _Plugin] = ("TIFF", TiffImagePlugin.TiffImageFile)
_PLUGINS: tuple[tuple[tuple[bytes, ...], tuple[str, _Plugin]], ...] = (
    ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), _TIFF),
    ((b"BM",), ("BMP", BmpImagePlugin.BmpImageFile)),
    (tuple(b"P%d" % kind for kind in range(1, 7)), ("PPM", PpmImagePlugin.PpmImageFile)),
)
# Modes of Pillow whose values have no known range.
_NO_RANGE: dict[str, tuple[str, ...]] = {"TIFF": ("F", "I"), "PPM": ("F",), "BMP": ()}


def decode_local(data: bytes, *, size: int | None = None) -> NDArray[np.uint8]:
    """The pixels of an encoded image, [H, W, 3]; see `decode`. Raises ImageError."""
    for beginnings, (name, plugin) in _PLUGINS:
        if data.startswith(beginnings):
            return _decode(data, name, plugin)
    try:
        return decode(data, LIMITS, size=size)
    except FormatError as error:
        raise FormatError(error.found, (*FORMATS, *_NO_RANGE)) from None


def _decode(data: bytes, name: str, plugin: _Plugin) -> NDArray[np.uint8]:
    if len(data) > LIMITS.max_bytes:
        raise ImageError(f"found {len(data)} bytes; allowed: up to {LIMITS.max_bytes}")
    try:
        image = plugin(io.BytesIO(data))
        width, height = image.size
        if not 1 <= width * height <= LIMITS.max_pixels:
            raise ImageError(f"found {width} x {height} pixels; allowed: 1 to {LIMITS.max_pixels} in all")
        if (frames := getattr(image, "n_frames", 1)) != 1:
            raise ImageError(f"found a {name} of {frames} pages; allowed: 1")
        if image.mode in _NO_RANGE[name]:
            raise ImageError(f"found a {name} of values without a known range; allowed: 8 or 16 bits a channel")
        return np.asarray(upright(image))
    except (ImageError, MemoryError):
        raise
    # Pillow's parsers may raise any exception.
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ImageError(f"found a {name} that cannot be decoded: {reason}; allowed: a whole file") from None
