"""What a PNG or JPEG file says of itself, read from its bytes before anything is decoded."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"

# The first bytes of images in formats that are not taken.
_OTHER_IMAGES = {
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"<svg": "SVG",
    b"8BPS": "Photoshop",
    b"\x00\x00\x01\x00": "ICO",
    b"\x00\x00\x00\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\x00\x00\x00\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"P5": "PGM",
    b"P6": "PPM",
    b"qoif": "QOI",
}
_VIDEOS = frozenset({b"isom", b"mp41", b"mp42", b"qt  ", b"M4V ", b"iso2", b"3gp4", b"3gp5"})
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"}  # of ISO media files (ISO/IEC 14496-12); HEIC is the rest
# The first bytes of what people find in the place of an image; for messages only.
_OTHER_FORMATS = {
    b"%PDF": "PDF",
    b"<htm": "HTML",
    b"<!DO": "HTML",
    b"PK\x03\x04": "zip",
    b"\x1f\x8b": "gzip",
    b"\x93NUMPY": "NumPy",
}
# Start-of-frame markers; C4, C8 and CC in between mark other things (ITU T.81, table B.1).
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_STANDALONE = frozenset({0x01, *range(0xD0, 0xD8)})
_JPEG_DECODED = frozenset(
    {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}
)  # baseline, extended, progressive; the last two are arithmetic


class RefusedFormatError(ValueError):
    """An image of a format that is not taken."""


@dataclass(frozen=True)
class Header:
    """Format, size in pixels, and what Pillow would change without telling.

    Attributes:
        bits: per channel; Pillow drops the lower 8 of 16 in colour images.
        has_transparency: a PNG with a transparent colour or palette entry; Pillow loses it on conversion.
        is_animated: a PNG with more than one frame; Pillow gives the first.
        unreadable: what no decoder here can read of a whole image; "" for most.
    """

    format: str
    width: int
    height: int
    bits: int = 8
    has_transparency: bool = False
    is_animated: bool = False
    unreadable: str = ""


def read_header(data: bytes) -> Header:
    """Read the header of a PNG (every chunk's checksum is verified) or JPEG file.

    Raises:
        RefusedFormatError: an image of another format; the message says which.
        ValueError: no image, or damaged.
    """
    if data.startswith(PNG_SIGNATURE):
        return _read_png(data)
    if data.startswith(JPEG_SIGNATURE):
        return _read_jpeg(data)
    if not data:
        raise ValueError("an empty file")
    for start, name in _OTHER_IMAGES.items():
        if data.startswith(start):
            raise RefusedFormatError(f"a {name} file")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        raise RefusedFormatError("a WebP file")
    if data[4:8] == b"ftyp" and data[8:12] not in _VIDEOS:
        raise RefusedFormatError(f"a {_BRANDS.get(data[8:12], 'HEIC')} file")
    for start, name in _OTHER_FORMATS.items():
        if data.startswith(start):
            raise ValueError(f"a {name} file")
    raise ValueError(f"a file that starts with {data[:8]!r}")


def _read_png(data: bytes) -> Header:
    """Pillow skips the checksums of pixel data (IDAT) and may stop reading early, so they are verified here."""
    chunks = list(_png_chunks(data))
    if chunks and chunks[0][0] == b"CgBI":
        raise RefusedFormatError("a PNG in Apple's own variant (CgBI)")
    if not chunks or chunks[0][0] != b"IHDR" or len(chunks[0][1]) != 13:
        raise ValueError("a PNG without header")
    width, height, bits = struct.unpack(">IIB", chunks[0][1][:9])
    found = dict(reversed(chunks))
    if b"IDAT" not in found:
        raise ValueError("a PNG without pixels")
    frames = int.from_bytes(found.get(b"acTL", b"")[:4])
    return Header("PNG", width, height, bits, b"tRNS" in found, frames > 1)


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
    """Bytes between segments that belong to none are passed over, as every decoder does."""
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            at += 1
            continue
        marker = data[at + 1]
        if marker == 0x00:  # a stuffed 0xFF, of the same kind
            at += 2
            continue
        if marker == 0xFF or marker in _JPEG_STANDALONE:
            at += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        if marker in _JPEG_FRAMES:
            if length < 8 or at + 10 > len(data):
                break
            bits, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            unreadable = ""
            if bits != 8:
                unreadable = f"a JPEG of {bits} bits per channel, expected 8"
            elif marker not in _JPEG_DECODED:
                unreadable = "a lossless or hierarchical JPEG"
            elif channels not in (1, 3, 4):
                unreadable = f"a JPEG of {channels} channels, expected 1, 3 or 4"
            return Header("JPEG", width, height, bits, unreadable=unreadable)
        if marker == 0xDA or length < 2:  # pixels begin before any frame was declared
            break
        at += 2 + length
    raise ValueError("a truncated or damaged JPEG")
