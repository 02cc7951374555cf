"""The closest training images: against brute force, copies found as copies, and the sheet."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.metrics.classifier_store import classifier_for
from pipeline.metrics.neighbours import NUM_NEIGHBOURS, find_neighbours, neighbour_lines, write_neighbours
from tests.pipeline.metrics.array_set import ArraySet, digits


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
    np.testing.assert_array_equal(found.by_pixel.rows, order)
    np.testing.assert_allclose(found.by_pixel.distances, np.take_along_axis(rmse, order, axis=1), rtol=1e-12)
    ours, theirs = (extractor(images).features.astype(float) for images in (generated, data.images))
    between = np.linalg.norm(ours[:, None] - theirs[None], axis=2)
    np.testing.assert_allclose(
        found.by_feature.distances, np.sort(between, axis=1)[:, :NUM_NEIGHBOURS], rtol=1e-4, atol=1e-5
    )

    assert (found.by_pixel.rows[3, 0], found.by_pixel.rows[7, 0]) == (12, 1796)
    assert found.ratios[3] == found.ratios[7] == 0
    assert found.memorised == pytest.approx(2 / 20)  # noise of this size is no copy
    assert "10% of 20" in neighbour_lines(found)[0]

    sheet, about = write_neighbours(found, generated, data, tmp_path / "sheet", shown=5)
    told = json.loads(about.read_text())
    assert set(told["shown"][:2]) == {3, 7}
    assert told["by_pixel"]["rows"][3][0] == 12
    with Image.open(sheet) as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.shape[1] / pixels.shape[0] > 1.2  # seven columns, five rows
    assert pixels.std() > 10


def test_equally_close_images_come_by_row_whatever_the_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = digits().images[:60].copy()
    images[[5, 31, 32, 59]] = images[5]
    extractor = classifier_for(digits(), tmp_path / "cache")
    for size in (7, 60):
        monkeypatch.setattr("pipeline.metrics.neighbours._ROWS_AT_ONCE", size)
        found = find_neighbours(images[5:6], ArraySet(images), extractor, tmp_path / str(size))
        assert found.by_pixel.rows.tolist() == [[5, 31, 32]]
        assert found.by_pixel.distances.tolist() == [[0, 0, 0]]
