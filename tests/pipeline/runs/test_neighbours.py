"""The closest training images: against brute force, copies found as copies, and the sheet."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.metrics.classifier_store import classifier_for
from pipeline.metrics.neighbours import NUM_NEIGHBOURS, find_neighbours, neighbour_lines, write_neighbours
from pipeline.pictures.pictures import save_strip
from tests.kit.array_set import ArraySet, digits
from tests.kit.drawings import pixels_of


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_neighbours_are_those_of_brute_force_and_copies_are_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.metrics.neighbours._ROWS_AT_ONCE", 500)  # four chunks, the last a part
    data = digits()
    extractor = classifier_for(data, tmp_path / "cache")
    noise = np.random.default_rng(0).integers(-60, 60, (20, 1, 8, 8))
    generated = np.clip(data.images[1700:1720].astype(int) + noise, 0, 255).astype(np.uint8)
    generated[3], generated[7] = data.images[12], data.images[1796]
    found = find_neighbours(generated, data, extractor, tmp_path / "kept")

    apart = generated[:, None].astype(float) - data.images[None].astype(float)
    rmse = np.sqrt((apart**2).mean(axis=(2, 3, 4)))
    order = np.argsort(rmse, axis=1, kind="stable")[:, :NUM_NEIGHBOURS]
    np.testing.assert_array_equal(found.pixel.rows, order)
    np.testing.assert_allclose(found.pixel.distances, np.take_along_axis(rmse, order, axis=1), rtol=1e-12)
    ours, theirs = (extractor(images).features.astype(float) for images in (generated, data.images))
    between = np.linalg.norm(ours[:, None] - theirs[None], axis=2)
    np.testing.assert_allclose(
        found.feature.distances, np.sort(between, axis=1)[:, :NUM_NEIGHBOURS], rtol=1e-4, atol=1e-5
    )

    assert (found.pixel.rows[3, 0], found.pixel.rows[7, 0]) == (12, 1796)
    assert found.ratios[3] == found.ratios[7] == 0
    assert found.memorised == pytest.approx(2 / 20)  # noise of this size is no copy
    assert "10% of 20" in neighbour_lines(found)[0]

    sheet, about = write_neighbours(found, generated, data, tmp_path / "sheet", shown=5)
    told = json.loads(about.read_text())
    assert set(told["shown"][:2]) == {3, 7}
    assert told["by_pixel"]["rows"][3][0] == 12
    shown = np.argsort(found.ratios, kind="stable")[:5]
    assert told["shown"] == shown.tolist()
    columns = [generated[shown]]
    for nearest in (found.feature, found.pixel):
        columns += [data.images[nearest.rows[shown, i]] for i in range(NUM_NEIGHBOURS)]
    labels = [f"{space} {i + 1}" for space in ("feature", "pixel") for i in range(NUM_NEIGHBOURS)]
    save_strip(columns, tmp_path / "wanted.png", ["generated", *labels])
    np.testing.assert_array_equal(pixels_of(sheet), pixels_of(tmp_path / "wanted.png"))


def test_an_image_that_is_there_twice_is_one_neighbour_of_the_smaller_row_whatever_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = digits().images[:60].copy()
    images[[5, 31, 32, 59]] = images[5]
    extractor = classifier_for(digits(), tmp_path / "cache")
    generated = images[5:6].copy()
    generated[0, 0, 0, 0] ^= 1  # all but a copy
    apart = np.sqrt(((images.astype(float) - generated) ** 2).mean(axis=(1, 2, 3)))
    order = [row for row in np.argsort(apart, kind="stable").tolist() if row not in (31, 32, 59)][:NUM_NEIGHBOURS]
    for size in (7, 60):
        monkeypatch.setattr("pipeline.metrics.neighbours._ROWS_AT_ONCE", size)
        found = find_neighbours(generated, ArraySet(images), extractor, tmp_path / str(size))
        assert found.pixel.rows.tolist() == [order]
        assert order[0] == 5
        np.testing.assert_allclose(found.pixel.distances, [apart[order]], rtol=1e-12)
        assert found.ratios[0] == pytest.approx(apart[order[0]] / apart[order[1]])
        assert found.memorised == 1


def test_large_images_are_compared_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 rows of 256x256x3 in float64 would be 1.6 GB."""
    monkeypatch.setattr("pipeline.metrics.neighbours._FLOATS_AT_ONCE", 64 * 9)
    read: list[int] = []

    class Counted(ArraySet):
        def read(self, rows: object, /) -> np.ndarray:
            found = super().read(rows)
            read.append(len(found))
            return found

    data = digits()
    few = Counted(data.images[:20])
    find_neighbours(few.images[:2], few, classifier_for(data, tmp_path / "cache"), tmp_path / "kept")
    assert read == [9, 9, 2]
