"""What a PNG or JPEG file says of itself, read from its bytes before anything is decoded."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"

# The first bytes of files that people give as images; for messages only.
_OTHER_FORMATS = {
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"RIFF": "WebP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"%PDF": "PDF",
    b"<svg": "SVG",
    b"<htm": "HTML",
    b"<!DO": "HTML",
    b"PK\x03\x04": "zip",
    b"\x1f\x8b": "gzip",
    b"\x93NUMPY": "NumPy",
}
# Start-of-frame markers; C4, C8 and CC in between mark other things (ITU T.81, table B.1).
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_STANDALONE = frozenset({0x01, *range(0xD0, 0xD8)})


@dataclass(frozen=True)
class Header:
    """Format, size in pixels, and what Pillow would change without telling.

    Attributes:
        bits: per channel; Pillow drops the lower 8 of 16 in colour images.
        has_transparency: a PNG with a transparent colour or palette entry; Pillow loses it on conversion.
        is_animated: a PNG with more than one frame; Pillow gives the first.
    """

    format: str
    width: int
    height: int
    bits: int = 8
    has_transparency: bool = False
    is_animated: bool = False


def read_header(data: bytes) -> Header:
    """Read the header of a PNG (every chunk's checksum is verified) or JPEG file.

    Raises:
        ValueError: another format, or damaged; the message says which.
    """
    if data.startswith(PNG_SIGNATURE):
        return _read_png(data)
    if data.startswith(JPEG_SIGNATURE):
        return _read_jpeg(data)
    if not data:
        raise ValueError("an empty file")
    for start, name in _OTHER_FORMATS.items():
        if data.startswith(start):
            raise ValueError(f"a {name} file")
    raise ValueError(f"a file that starts with {data[:8]!r}")


def _read_png(data: bytes) -> Header:
    """Pillow skips the checksums of pixel data (IDAT) and may stop reading early, so they are verified here."""
    chunks = list(_png_chunks(data))
    if not chunks or chunks[0][0] != b"IHDR" or len(chunks[0][1]) != 13:
        raise ValueError("a PNG without header")
    width, height, bits = struct.unpack(">IIB", chunks[0][1][:9])
    kinds = {kind for kind, _ in chunks}
    if b"IDAT" not in kinds:
        raise ValueError("a PNG without pixels")
    return Header("PNG", width, height, bits, b"tRNS" in kinds, b"acTL" in kinds)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    view, at = memoryview(data), len(PNG_SIGNATURE)
    while True:
        if at + 12 > len(view):
            raise ValueError("a truncated PNG")
        (length,) = struct.unpack_from(">I", view, at)
        end = at + 8 + length
        if end + 4 > len(view):
            raise ValueError("a truncated PNG")
        kind = bytes(view[at + 4 : at + 8])
        if zlib.crc32(view[at + 4 : end]) != struct.unpack_from(">I", view, end)[0]:
            raise ValueError(f"a damaged PNG (checksum of its {kind.decode('latin-1')} chunk)")
        yield kind, view[at + 8 : end]
        if kind == b"IEND":
            return
        at = end + 4


def _read_jpeg(data: bytes) -> Header:
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            raise ValueError("a damaged JPEG")
        marker = data[at + 1]
        if marker == 0xFF or marker in _JPEG_STANDALONE:
            at += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        if marker in _JPEG_FRAMES:
            if length < 8 or at + 9 > len(data):
                break
            bits, height, width = struct.unpack_from(">BHH", data, at + 4)
            return Header("JPEG", width, height, bits)
        if marker == 0xDA or length < 2:  # pixels begin before any frame was declared
            break
        at += 2 + length
    raise ValueError("a truncated or damaged JPEG")
