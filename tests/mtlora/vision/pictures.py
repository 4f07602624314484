"""Encoded images, good ones and bad ones."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def photograph(width: int = 40, height: int = 30) -> Image.Image:
    """A smooth picture whose four corners differ."""
    y_HW, x_HW = np.mgrid[0:height, 0:width]
    pixels_HWC = np.stack([x_HW * 255 / width, y_HW * 255 / height, 255 - x_HW * 255 / width], axis=-1)
    return Image.fromarray(pixels_HWC.astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(width: int = 50_000, height: int = 50_000) -> bytes:
    """A PNG of a few kilobytes that claims gigabytes of pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))


def jpeg_bomb() -> bytes:
    """A JPEG whose header claims 65,535 pixels a side."""
    data = bytearray(encoded(photograph(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\xff" * 4
    return bytes(data)


def webp_bomb() -> bytes:
    """A WebP whose canvas claims 16,384 pixels a side."""
    data = bytearray(encoded(photograph(), "WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"))
    assert data[12:16] == b"VP8X"
    data[24:30] = b"\xff\x3f\0\xff\x3f\0"
    return bytes(data)


def many_scans(scans: int) -> bytes:
    """A progressive JPEG with its last scan repeated."""
    data = encoded(photograph(), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * scans + data[-2:]


def animated(kind: str) -> bytes:
    return encoded(photograph(), kind, save_all=True, append_images=[Image.new("RGB", (40, 30), "red")], duration=50)


SVG = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'
