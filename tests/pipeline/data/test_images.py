"""Images in and out: scaling without loss, the table of modes, limits, and damage."""

from __future__ import annotations

import io
import json
import re
import struct
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin

from pipeline.data.images import (
    DamagedImageError,
    convert_array,
    crop_and_resize,
    decode_image,
    flip,
    to_float,
    to_uint8,
)
from pipeline.errors import DataError, DivergedError
from tests.kit.data import (
    COLOUR,
    COLOUR_ALPHA,
    GREY,
    GREY_ALPHA,
    PALETTE,
    Pixels,
    chunk,
    jpeg_of,
    png,
    png_of,
    some_images,
)

LEVELS = torch.arange(256, dtype=torch.uint8)

# -- tensors ------------------------------------------------------------------------------------------------------------


def test_each_of_the_256_values_is_scaled_to_the_nearest_float32() -> None:
    for level, value in zip(range(256), to_float(LEVELS).numpy(), strict=True):
        exact = Fraction(2 * level - 255, 255)
        neighbours = (np.nextafter(value, np.float32(-2)), value, np.nextafter(value, np.float32(2)))
        assert min(neighbours, key=lambda x: abs(Fraction(float(x)) - exact)) == value
    assert to_float(LEVELS)[[0, 255]].tolist() == [-1.0, 1.0]
    assert torch.equal(to_float(255 - LEVELS), -to_float(LEVELS))


def test_scaling_back_inverts_rounds_and_clamps() -> None:
    assert torch.equal(to_uint8(to_float(LEVELS)), LEVELS)
    step = 2 / 255
    inner = to_float(LEVELS)[1:-1]
    assert torch.equal(to_uint8(inner + 0.49 * step), LEVELS[1:-1])
    assert torch.equal(to_uint8(inner - 0.49 * step), LEVELS[1:-1])
    assert to_uint8(torch.tensor([-1.7, 3.0, 1e30])).tolist() == [0, 255, 255]
    assert torch.equal(to_uint8(to_float(LEVELS).double()), LEVELS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_no_picture(value: float) -> None:
    with pytest.raises(DivergedError, match="non-finite"):
        to_uint8(torch.tensor([0.0, value]))


def test_flip_mirrors_the_chosen_images_alone() -> None:
    images = torch.arange(2 * 1 * 2 * 3).reshape(2, 1, 2, 3)
    flipped = flip(images, torch.tensor([False, True]))
    assert flipped[0].tolist() == [[[0, 1, 2], [3, 4, 5]]]
    assert flipped[1].tolist() == [[[8, 7, 6], [11, 10, 9]]]


# -- the table of modes in docs/data.md ---------------------------------------------------------------------------------


def luma(rgb: Any) -> Any:
    """ITU-R 601-2 luma, (299 R + 587 G + 114 B) / 1000, to the nearest level."""
    return np.asarray(
        [[(299 * int(r) + 587 * int(g) + 114 * int(b) + 500) // 1000 for r, g, b in line] for line in rgb]
    )[..., None]


def grey(*lines: list[int]) -> Pixels:
    return np.array(lines, dtype=np.uint8)[..., None]


def colour_of(pixels: Pixels) -> Pixels:
    return np.repeat(pixels, 3, axis=2)


def over_white(rgb: Pixels, alpha: Pixels) -> Pixels:
    a = alpha.astype(np.float64) / 255
    return np.rint(rgb * a + 255 * (1 - a)).astype(np.uint8)


def with_orientation(orientation: int, file_format: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(COLOURS).save(file, file_format, exif=exif, **({} if file_format == "PNG" else {"quality": 100}))
    return file.getvalue()


def animated() -> bytes:
    file = io.BytesIO()
    frames = [Image.fromarray(frame) for frame in some_images(2, (4, 4, 3))]
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    return file.getvalue()


def of_several_pictures() -> bytes:
    file = io.BytesIO()
    frames = [Image.fromarray(frame) for frame in some_images(2, (16, 16, 3))]
    frames[0].save(file, "MPO", save_all=True, append_images=frames[1:])
    return file.getvalue()


def twelve_bits() -> bytes:
    data = bytearray(jpeg_of(some_images(1, (8, 8, 3))[0]))
    data[data.index(b"\xff\xc0") + 4] = 12
    return bytes(data)


def saved(mode: str, file_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(some_images(1, (8, 8, 3))[0]).convert(mode).save(file, file_format, **options)
    return file.getvalue()


COLOURS = some_images(1, (2, 3, 3))[0]
ALPHA = np.array([[0, 255, 128], [1, 77, 254]], dtype=np.uint8)[..., None]
GREYS = grey([0, 17, 255], [128, 1, 254])
BITS = grey([0, 255, 0, 255, 0, 0, 255, 255])  # 0x53
WORDS = np.array([[0x1234, 0xFF00, 0x00FF], [0x8080, 0xFFFF, 0]], dtype=">u2")
HIGH_BYTES = grey([0x12, 0xFF, 0], [0x80, 0xFF, 0])

# image (as in the table): file, then what is expected without a mode, with L, with RGB; None = refused
CASES: dict[str, tuple[bytes, Any, Any, Any]] = {
    "8-bit grey (L)": (png_of(GREYS), GREYS, GREYS, colour_of(GREYS)),
    "2- or 4-bit grey PNG": (
        png(4, 1, 2, GREY, bytes([0b00_01_10_11])),
        grey([0, 85, 170, 255]),
        grey([0, 85, 170, 255]),
        colour_of(grey([0, 85, 170, 255])),
    ),
    "8-bit colour (RGB; JPEG's YCbCr too)": (png_of(COLOURS), COLOURS, luma(COLOURS), COLOURS),
    "1-bit PNG": (
        png(8, 1, 1, GREY, b"\x53"),
        None,
        BITS,
        colour_of(BITS),
    ),
    "palette PNG (P)": (
        png(3, 2, 8, PALETTE, bytes(range(6)), chunk(b"PLTE", COLOURS.tobytes())),
        None,
        luma(COLOURS),
        COLOURS,
    ),
    "transparency (LA, RGBA, a transparent colour or palette entry)": (
        png(3, 2, 8, COLOUR_ALPHA, np.concatenate([COLOURS, ALPHA], axis=2).tobytes()),
        None,
        luma(over_white(COLOURS, ALPHA)),
        over_white(COLOURS, ALPHA),
    ),
    "16 bits per channel": (
        png(3, 2, 16, GREY, WORDS.tobytes()),
        None,
        HIGH_BYTES,
        colour_of(HIGH_BYTES),
    ),
    "16 bits and a transparent colour": (
        png(3, 2, 16, GREY, WORDS.tobytes(), chunk(b"tRNS", b"\x12\x34")),
        None,
        None,
        None,
    ),
    "CMYK or YCCK JPEG": (saved("CMYK", "JPEG"), None, (8, 8, 1), (8, 8, 3)),
    "EXIF orientation other than upright": (
        with_orientation(6),  # to be shown turned by 90 degrees clockwise (EXIF 2.3, 4.6.4 A)
        None,
        luma(np.rot90(COLOURS, -1)),
        np.rot90(COLOURS, -1),
    ),
    "JPEG of several pictures (MPO, as phones write them): the main one": (
        of_several_pictures(),
        (16, 16, 3),
        (16, 16, 1),
        (16, 16, 3),
    ),
    "animated PNG": (animated(), None, None, None),
    "JPEG of other than 8 bits or of 2 channels": (twelve_bits(), None, None, None),
    "any other format (GIF, WebP, TIFF, BMP, SVG, HEIC, ...)": (saved("RGB", "GIF"), None, None, None),
}


@pytest.mark.fault(12)
@pytest.mark.parametrize("kind", CASES)
def test_the_table_of_modes(kind: str) -> None:
    data, *expected = CASES[kind]
    for mode, wanted in zip((None, "L", "RGB"), expected, strict=True):
        if wanted is None:
            with pytest.raises(DataError, match=r"^photo\.png"):
                decode_image(data, mode=mode, where="photo.png")
        elif isinstance(wanted, tuple):  # lossy: only its form is known
            assert decode_image(data, mode=mode).shape == wanted
        else:
            found = decode_image(data, mode=mode)
            assert found.dtype == np.uint8
            blended = mode == "L" or "transparency" in kind  # which Pillow computes in fixed point
            np.testing.assert_allclose(found.astype(int), np.asarray(wanted, dtype=int), rtol=0, atol=int(blended))


@pytest.mark.fault(12)
def test_the_documented_table_is_the_tested_one() -> None:
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    section = text.partition("| image | without `--mode` |")[2].partition("\n\n")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")
    ][1:]
    assert [row[0] for row in rows] == list(CASES)
    for image, without, converted in rows:
        assert (without == "taken") == (CASES[image][1] is not None)
        assert (without == "refused") == (CASES[image][1] is None)
        assert (converted == "refused") == (CASES[image][2] is None)


MORE: dict[str, tuple[bytes, str]] = {
    "LA": (png(3, 2, 8, GREY_ALPHA, np.concatenate([GREYS, ALPHA], axis=2).tobytes()), "has transparency"),
    "a transparent grey": (png(3, 2, 8, GREY, GREYS.tobytes(), chunk(b"tRNS", b"\0\x11")), "has transparency"),
    "a transparent palette entry": (
        png(3, 2, 8, PALETTE, bytes(range(6)), chunk(b"PLTE", COLOURS.tobytes()), chunk(b"tRNS", b"\0")),
        "has transparency",
    ),
    "16-bit colour": (png(1, 1, 16, COLOUR, b"\x12\x34" * 3), "has 16 bits per channel"),
    "16-bit colour and alpha": (png(1, 1, 16, COLOUR_ALPHA, b"\x12\x34" * 4), "has 16 bits per channel"),
    "a turned JPEG": (with_orientation(3, "JPEG"), r"is to be shown turned \(EXIF orientation 3\)"),
    "an animation": (animated(), "holds several frames"),
    "12 bits": (twelve_bits(), r"a JPEG that Pillow cannot read \(cannot handle 12-bit layers\)"),
    "HEIC": (b"\0\0\0\x18ftypheic" + bytes(16), "a HEIC file, expected a PNG or JPEG"),
    "AVIF": (b"\0\0\0\x18ftypavif" + bytes(16), "a AVIF file, expected a PNG or JPEG"),
    "WebP": (saved("RGB", "WEBP"), "a WEBP file, expected a PNG or JPEG"),
    "TIFF": (saved("RGB", "TIFF"), "a TIFF file, expected"),
    "BMP": (saved("RGB", "BMP"), "a BMP file, expected"),
    "PDF": (saved("RGB", "PDF"), "a PDF file, expected"),
    "HTML": (b"<!DOCTYPE html><html></html>", "a HTML file, expected"),
    "text": (b"Dear diary, ...", "a file that starts with b'Dear dia', expected"),
    "nothing": (b"", "an empty file, expected"),
    "a PNG signature alone": (b"\x89PNG\r\n\x1a\n", "a damaged PNG image"),
    "a JPEG signature alone": (b"\xff\xd8\xff", "a damaged JPEG image"),
}


@pytest.mark.fault(12)
@pytest.mark.parametrize("kind", MORE)
def test_refusals_say_what_was_got(kind: str) -> None:
    data, message = MORE[kind]
    with pytest.raises(DataError, match=message) as error:
        decode_image(data, where="photo.png")
    assert "\n" not in str(error.value)
    assert re.search(r": [^:]+$", str(error.value)), "no remedy"


DAMAGED = {"HTML", "text", "nothing", "PDF", "a PNG signature alone", "a JPEG signature alone"}


@pytest.mark.fault(10)
def test_what_the_table_refuses_is_not_called_damaged() -> None:
    for kind, (data, _) in MORE.items():
        with pytest.raises(DataError) as error:
            decode_image(data)
        assert isinstance(error.value, DamagedImageError) == (kind in DAMAGED), kind
        assert ("damaged" in str(error.value)) <= (kind in DAMAGED), kind
    for kind, (data, without, *_) in CASES.items():
        if without is None:
            with pytest.raises(DataError, match=r"^(?!.*damaged)") as error:
                decode_image(data)
            assert not isinstance(error.value, DamagedImageError), kind


def test_the_main_picture_of_several_is_taken() -> None:
    file = io.BytesIO()
    main, other = (Image.fromarray(frame) for frame in some_images(2, (16, 16, 3)))
    main.save(file, "MPO", save_all=True, append_images=[other], quality=95)
    np.testing.assert_array_equal(decode_image(file.getvalue()), decode_image(jpeg_of(np.asarray(main), quality=95)))


@pytest.mark.parametrize("stray", [b"\0", b"\x12\x34\x56", b"\xff\xff", b"\xff\x00\x07"])
def test_bytes_between_the_segments_of_a_jpeg_are_skipped_as_pillow_does(stray: bytes) -> None:
    sound = jpeg_of(some_images(1, (16, 16, 3))[0])
    at, places = 2, 0
    while sound[at + 1] != 0xDA:  # up to the pixels
        data = sound[:at] + stray + sound[at:] if at > 2 else sound
        np.testing.assert_array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data))))
        at, places = at + 2 + int.from_bytes(sound[at + 2 : at + 4]), places + 1
    assert places > 3


def test_an_animation_of_one_frame_is_a_picture() -> None:
    control = chunk(b"acTL", struct.pack(">II", 1, 0)) + chunk(
        b"fcTL", struct.pack(">5I2H2B", 0, 3, 2, 0, 0, 1, 1, 0, 0)
    )
    np.testing.assert_array_equal(decode_image(png(3, 2, 8, COLOUR, COLOURS.tobytes(), control)), COLOURS)


@pytest.mark.parametrize(
    ("orientation", "turn"), [(2, np.fliplr), (3, lambda a: np.rot90(a, 2)), (4, np.flipud), (8, np.rot90)]
)
def test_orientations_are_turned_upright(orientation: int, turn: Any) -> None:
    np.testing.assert_array_equal(decode_image(with_orientation(orientation), mode="RGB"), turn(COLOURS))


def test_an_upright_orientation_and_unreadable_exif_change_nothing() -> None:
    np.testing.assert_array_equal(decode_image(with_orientation(1)), COLOURS)
    file = io.BytesIO()
    Image.fromarray(COLOURS).save(file, "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    np.testing.assert_array_equal(decode_image(file.getvalue()), COLOURS)


def test_a_palette_is_blended_over_white() -> None:
    data = png(2, 1, 8, PALETTE, b"\0\1", chunk(b"PLTE", bytes([9, 8, 7, 100, 50, 0])), chunk(b"tRNS", b"\0\xff"))
    assert decode_image(data, mode="RGB").tolist() == [[[255, 255, 255], [100, 50, 0]]]


def test_pixels_are_those_of_the_file_whatever_its_profile() -> None:
    gamma, profile = chunk(b"gAMA", struct.pack(">I", 10)), chunk(b"sRGB", b"\0")
    np.testing.assert_array_equal(decode_image(png(3, 2, 8, COLOUR, COLOURS.tobytes(), gamma, profile)), COLOURS)


def test_arrays_are_converted_like_files() -> None:
    np.testing.assert_array_equal(convert_array(GREYS, "RGB"), colour_of(GREYS))
    np.testing.assert_array_equal(convert_array(COLOURS, "L"), decode_image(png_of(COLOURS), mode="L"))
    assert convert_array(COLOURS, None) is COLOURS
    with pytest.raises(DataError, match=r"4 channels, --mode RGB converts from 1 or 3"):
        convert_array(np.zeros((2, 2, 4), dtype=np.uint8), "RGB")


# -- limits and damage --------------------------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    line = zlib.compressobj()
    pixels = b"".join(line.compress(b"\0" * (width + 1)) for _ in range(height)) + line.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, GREY, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.fault(11)
def test_bombs_are_refused_from_their_header(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a bomb reached the decoder")

    small_file = bomb(9500, 9500)
    assert len(small_file) < 200_000
    wide_jpeg = bytearray(jpeg_of(some_images(1, (8, 8, 3))[0]))
    frame = wide_jpeg.index(b"\xff\xc0")
    wide_jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65500, 65500)
    monkeypatch.setattr(ImageFile.ImageFile, "load", opened)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", opened)
    for data, size in (
        (small_file, "9500x9500"),
        (bytes(wide_jpeg), "65500x65500"),
        (png(2**31 - 1, 1, 8, GREY, b""), "2147483647x1"),
    ):
        with pytest.raises(DataError, match=f"{size} pixels, more than the limit of"):
            decode_image(data)
    with pytest.raises(DataError, match=r"3x2 pixels, more than the limit of 5"):
        decode_image(png_of(COLOURS), max_pixels=5)
    with pytest.raises(DataError, match=r"bytes, more than the limit of 134217728"):
        decode_image(bytes(2**27 + 1))


@pytest.mark.fault(11)
def test_a_text_bomb_in_a_png_is_refused() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "b" * 2**23, zip=True)
    file = io.BytesIO()
    Image.fromarray(COLOURS).save(file, "PNG", pnginfo=info)
    with pytest.raises(DataError, match="a damaged PNG image"):
        decode_image(file.getvalue())


@pytest.mark.fault(10)
def test_every_truncation_of_a_png_and_of_a_jpeg_is_noticed() -> None:
    image = some_images(1, (9, 11, 3))[0]
    # without the checksum of its empty last chunk a PNG is whole, and so is a JPEG without its end marker
    for data, end in ((png_of(image), 4), (jpeg_of(image), 2)):
        decode_image(data)
        for length in range(len(data) - end):
            with pytest.raises(DataError):
                decode_image(data[:length])


FUZZ = """
import json, random, sys
from pathlib import Path
import numpy as np
from pipeline.errors import DataError
from pipeline.data.images import decode_image
counts = {}
for name in ("png", "palette", "jpeg"):
    sound = Path(sys.argv[1], name).read_bytes()
    original = decode_image(sound, mode="RGB")
    chance, count = random.Random(name), {"error": 0, "same": 0, "changed": 0}
    for _ in range(4000):
        data = bytearray(sound)
        for _ in range(chance.choice([1, 1, 2, 8])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            same = np.array_equal(decode_image(bytes(data), mode="RGB", max_pixels=10**6), original)
            count["same" if same else "changed"] += 1
        except DataError:
            count["error"] += 1
    counts[name] = count
print(json.dumps(counts))
"""


@pytest.mark.fault(10)
def test_damaged_images_never_crash_and_pngs_never_change_in_silence(tmp_path: Path) -> None:
    image = some_images(1, (20, 20, 3))[0]
    (tmp_path / "png").write_bytes(png_of(image))
    (tmp_path / "palette").write_bytes(CASES["palette PNG (P)"][0])
    (tmp_path / "jpeg").write_bytes(jpeg_of(image))
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", FUZZ, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    counts = json.loads(process.stdout)
    assert counts["png"]["changed"] == counts["palette"]["changed"] == 0
    assert min(counts[name]["error"] for name in counts) > 100


# -- crop and resize ----------------------------------------------------------------------------------------------------


def test_a_centred_part_of_the_asked_aspect_is_cut() -> None:
    image = some_images(1, (4, 9, 3))[0]
    np.testing.assert_array_equal(crop_and_resize(image, (4, 3)), image[:, 3:6])
    np.testing.assert_array_equal(crop_and_resize(image, (4, 9)), image)
    tall = some_images(1, (8, 3, 1))[0]
    np.testing.assert_array_equal(crop_and_resize(tall, (2, 3)), tall[3:5])
    assert crop_and_resize(image, (7, 5)).shape == (7, 5, 3)


@pytest.mark.parametrize("size", [(7, 5), (16, 16), (40, 9), (20, 30)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_file_is_resized_to_the_pixels_of_its_array(size: tuple[int, int], mode: str) -> None:
    data = jpeg_of(some_images(1, (20, 30, 3))[0])
    expected = crop_and_resize(decode_image(data, mode=mode), size)
    np.testing.assert_array_equal(decode_image(data, mode=mode, size=size), expected)


def test_a_ramp_stays_a_ramp() -> None:
    """Cubic interpolation reproduces straight lines (Keys 1981), away from the borders."""
    ramp = np.broadcast_to(np.arange(0, 256, 2, dtype=np.uint8)[None, :, None], (128, 128, 1)).copy()
    small = crop_and_resize(ramp, (32, 32))[:, :, 0].astype(int)
    expected = 2 * (4 * np.arange(32) + 1.5)
    assert np.abs(small - expected)[:, 3:-3].max() <= 1


def test_resizing_does_not_alias() -> None:
    """Stripes finer than the new pixels become their mean; taking single pixels would give 0 or 255."""
    stripes = np.tile(np.array([0, 255], dtype=np.uint8)[None, :, None], (64, 32, 3))
    small = crop_and_resize(stripes, (16, 16)).astype(int)
    assert np.abs(small[:, 2:-2] - 127.5).max() <= 3
