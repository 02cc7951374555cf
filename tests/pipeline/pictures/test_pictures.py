"""Pictures for people: every image is in them, whole, legible and where it belongs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.ingest.ingest import ingest
from pipeline.pictures.pictures import card_lines, dataset_card, inspect_picture, save_grid, save_strip
from tests.kit.data import dataset_of, some_images
from tests.kit.drawings import pixels_of, place_of


@pytest.mark.parametrize(
    ("shape", "scale"), [((8, 8, 1), 8), ((32, 32, 3), 2), ((28, 20, 1), 2), ((64, 64, 3), 1), ((90, 40, 3), 1)]
)
@pytest.mark.parametrize("captioned", [False, True])
def test_a_grid_has_every_image_in_reading_order(
    tmp_path: Path, shape: tuple[int, int, int], scale: int, captioned: bool
) -> None:
    images = some_images(7, shape).transpose(0, 3, 1, 2)
    save_grid(
        torch.from_numpy(images), tmp_path / "g.png", captions=[f"number {i}" for i in range(7)] if captioned else None
    )
    sheet = pixels_of(tmp_path / "g.png")
    places = [place_of(image, sheet, scale) for image in images]
    assert places == sorted(places)
    tops, lefts = ([place[axis] for place in places] for axis in (0, 1))
    assert [tops.count(top) for top in sorted(set(tops))] == [3, 3, 1]
    assert len(set(lefts)) == 3
    below = tops[0] + shape[0] * scale
    assert (sheet[below : tops[3]] < 128).any() == captioned  # dark ink between the rows


def test_a_grid_takes_as_many_columns_as_asked(tmp_path: Path) -> None:
    images = some_images(6, (8, 8, 3)).transpose(0, 3, 1, 2)
    save_grid(images, tmp_path / "g.png", columns=6)
    places = [place_of(image, pixels_of(tmp_path / "g.png"), 8) for image in images]
    assert len({top for top, _ in places}) == 1


def test_a_strip_has_images_down_and_time_across(tmp_path: Path) -> None:
    frames = [some_images(2, (8, 8, 1), seed).transpose(0, 3, 1, 2) for seed in range(5)]
    save_strip(frames, tmp_path / "s.png", labels=[f"t = {t}" for t in range(5)])
    sheet = pixels_of(tmp_path / "s.png")
    places = np.array(
        [[place_of(image, sheet, 8) for image in frame] for frame in frames]
    )  # [time, image, (top, left)]
    assert (np.diff(places[:, :, 1], axis=0) > 0).all()
    assert (np.diff(places[:, :, 0], axis=1) > 0).all()
    assert len(np.unique(places[:, 0, 0])) == len(np.unique(places[0, :, 1])) == 1
    assert (sheet[: places[0, 0, 0]] < 128).any()  # the labels


def test_images_of_two_and_four_channels_are_shown_too(tmp_path: Path) -> None:
    for channels, shown in ((2, [0, 0, 0]), (4, [0, 1, 2])):
        images = some_images(1, (8, 8, channels)).transpose(0, 3, 1, 2)
        save_grid(images, tmp_path / "g.png")
        place_of(images[0][shown], pixels_of(tmp_path / "g.png"), 8)


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    images = some_images(2).transpose(0, 3, 1, 2)
    with pytest.raises(ValueError, match=r"expected uint8 images \[n, C, H, W\], got float64"):
        save_grid(images / 255, tmp_path / "g.png")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shorter"):
        save_grid(images, tmp_path / "g.png", captions=["one"])
    with pytest.raises(ValueError, match="shorter"):
        save_strip([images, images], tmp_path / "g.png", labels=["one"])
    with pytest.raises(ValueError, match="same shape"):
        save_strip([images, images[:1]], tmp_path / "g.png", labels=["one", "two"])
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_shows_images_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path / "d", some_images(100, (8, 8, 1)), np.arange(100) % 3)
    inspect_picture(dataset, tmp_path / "p.png", num_images=4)
    for row in (0, 33, 66, 99):
        place_of(dataset.read([row])[0], pixels_of(tmp_path / "p.png"), 8)
    small = dataset_of(tmp_path / "s", some_images(3, (8, 8, 1)))
    inspect_picture(small, tmp_path / "q.png")
    for image in small.read(range(3)):
        place_of(image, pixels_of(tmp_path / "q.png"), 8)


def test_the_card_says_what_the_dataset_is(tmp_path: Path) -> None:
    manifest = ingest("digits", tmp_path / "d")
    card = dataset_card(manifest)
    files = sum(path.stat().st_size for path in (tmp_path / "d").glob("*.parquet"))
    assert (card["images"], card["shape"]) == (1797, {"channels": 1, "height": 8, "width": 8})
    assert (card["bytes_on_disk"], card["bytes_in_memory"]) == (files, 1797 * 64)
    lines = card_lines({**card, "verified": "every row"})
    text = "\n".join(lines)
    for said in ("digits", "1,797 of 8x8, grey", "10 (0, 1, 2", manifest.fingerprint, "every row"):
        assert said in text
    assert f"{manifest.mean[0]:+.3f} ± {manifest.std[0]:.3f} on [-1, 1]" in text
    unlabelled = dataset_of(tmp_path / "u", some_images(2))
    assert any(line.split() == ["classes", "none"] for line in card_lines(dataset_card(unlabelled.manifest)))
