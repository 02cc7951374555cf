"""File formats by their first bytes: PNG and JPEG are accepted, the others are named in messages."""

from __future__ import annotations

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"

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
_NO_IMAGES = {
    b"%PDF": "PDF",
    b"<htm": "HTML",
    b"<!DO": "HTML",
    b"PK\x03\x04": "zip",
    b"\x1f\x8b": "gzip",
    b"\x93NUMPY": "NumPy",
}


class RefusedFormatError(ValueError):
    """An image of a format that is not accepted."""


def require_png_or_jpeg(data: bytes) -> str:
    """Return "PNG" or "JPEG".

    Raises:
        RefusedFormatError: an image of another format; the message names it.
        ValueError: not an image.
    """
    if data.startswith(PNG_SIGNATURE):
        if data[12:16] == b"CgBI":
            raise RefusedFormatError("a PNG in Apple's own variant (CgBI)")
        return "PNG"
    if data.startswith(JPEG_SIGNATURE):
        return "JPEG"
    if not data:
        raise ValueError("an empty file")
    for start, name in _OTHER_IMAGES.items():
        if data.startswith(start):
            raise RefusedFormatError(f"a {name} file")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        raise RefusedFormatError("a WebP file")
    if data[4:8] == b"ftyp" and data[8:12] not in _VIDEOS:
        raise RefusedFormatError(f"a {_BRANDS.get(data[8:12], 'HEIC')} file")
    for start, name in _NO_IMAGES.items():
        if data.startswith(start):
            raise ValueError(f"a {name} file")
    raise ValueError(f"a file that starts with {data[:8]!r}")
