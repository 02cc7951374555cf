"""File formats by their first bytes: PNG and JPEG are accepted, the others are named in messages."""

from __future__ import annotations

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"

# images that Pillow does not know
_OTHER_IMAGES = {b"<svg": "SVG", b"\x00\x00\x00\x0cJXL ": "JPEG XL", b"\xff\x0a": "JPEG XL"}
_VIDEOS = frozenset({b"isom", b"mp41", b"mp42", b"qt  ", b"M4V ", b"iso2", b"3gp4", b"3gp5"})
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
    for start, name in _NO_IMAGES.items():
        if data.startswith(start):
            raise ValueError(f"a {name} file")
    if other := _other_image(data[:16].ljust(16, b"\0")):
        raise RefusedFormatError(f"a {other} file")
    raise ValueError(f"a file that starts with {data[:8]!r}")


def _other_image(start: bytes) -> str | None:
    """Return the name of an image format by its first 16 bytes, which are all that Pillow sees; None if it is not an image."""
    from PIL import Image

    Image.init()
    for name, (_, accepts) in Image.OPEN.items():
        if accepts is not None and accepts(start):
            return name
    if start[4:8] == b"ftyp" and start[8:12] not in _VIDEOS:  # of ISO media files (ISO/IEC 14496-12)
        return "HEIC"
    return next((name for signature, name in _OTHER_IMAGES.items() if start.startswith(signature)), None)
