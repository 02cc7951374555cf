"""Generated images beside the training images closest to them, by feature and by pixel: has the model learnt, or memorised?

The training images are read once, by canonical chunk and over the workers; each chunk gives its closest ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline.data.image_set import Images, ImageSet
from pipeline.metrics.features import FeatureExtractor
from pipeline.metrics.fit_rule import Hashes, content_hashes
from pipeline.pictures.pictures import save_strip
from pipeline.storage.durable import write_atomically
from pipeline.storage.home import make_folder
from pipeline.storage.tensor_file import Arrays
from pipeline.training.chunks import ChunkStore, Runner, Task, as_it_stands, compute
from pipeline.training.device import Compute, shared_arithmetic

PICTURE_FILE, JSON_FILE = "neighbours.png", "neighbours.json"
NUM_NEIGHBOURS = 3
MEMORISED_RATIO = 1 / 3  # nearest over second nearest, by pixel: below it a copy (Yoon et al. 2023)

_ROWS_AT_ONCE = 1000
_FLOATS_AT_ONCE = 1 << 24  # pixels of a chunk as float64: 128 MiB
_FORMAT = 2


class Nearest(NamedTuple):
    """Distances float64 [q, k] from each of q images to its closest training images, ascending, with their rows int64 [q, k].

    All rows of an image have different content (`contents`, uint64 [q, k]): a training image that occurs twice is one neighbour.
    Otherwise a generated copy of it would be as near to the second nearest as to the nearest.
    """

    distances: npt.NDArray[np.float64]
    rows: npt.NDArray[np.int64]
    contents: Hashes

    def closest(self, other: Nearest, k: int) -> Nearest:
        """Return the k closest of both; among equally close or equal ones, those with the smaller row."""
        distances, rows, contents = (np.concatenate(pair, axis=1) for pair in zip(self, other, strict=True))
        order = np.lexsort((rows, distances), axis=1)
        chosen = [line[_firsts(contents[i, line])][:k] for i, line in enumerate(order)]
        fewest = min(map(len, chosen))
        which = np.array([line[:fewest] for line in chosen])
        return Nearest(*(np.take_along_axis(array, which, axis=1) for array in (distances, rows, contents)))


class Neighbours(NamedTuple):
    """The closest training images of some generated ones.

    Attributes:
        feature: by Euclidean distance of the extractor's features.
        pixel: by root mean squared difference of pixels, on 0 .. 255.
    """

    feature: Nearest
    pixel: Nearest

    @property
    def ratios(self) -> npt.NDArray[np.float64]:
        """Pixel distance to the nearest training image over that to the second nearest [q]; 0 of a copy."""
        nearest, second = self.pixel.distances[:, 0], self.pixel.distances[:, 1]
        return np.divide(nearest, second, out=np.zeros_like(nearest), where=second > 0)

    @property
    def memorised(self) -> float:
        """Share of the images that are almost copies: nearer than a third of the distance to any other training image."""
        return float((self.ratios < MEMORISED_RATIO).mean())


def find_neighbours(
    generated: Images,
    dataset: ImageSet,
    extractor: FeatureExtractor,
    folder: Path,
    *,
    computed_on: torch.device | None = None,
    runner: Runner = as_it_stands,
    progress: Callable[[int], None] | None = None,
) -> Neighbours:
    """Return the closest images of a dataset to each of `generated`, uint8 [q, C, H, W]; what is computed is kept in `folder`.

    `computed_on` is the kind of device of `runner`, by default the CPU.
    """
    features = extractor(generated).features
    key = {
        "dataset": dataset.manifest.fingerprint,
        "extractor": [extractor.name, extractor.sha256],
        "generated": hashlib.sha256(generated.tobytes()).hexdigest(),
        "k": NUM_NEIGHBOURS,
        "arithmetic": shared_arithmetic(computed_on or torch.device("cpu")),
    }
    task = NearestOfRows(dataset, extractor, generated, features)
    at_once = min(_ROWS_AT_ONCE, max(1, _FLOATS_AT_ONCE // dataset.manifest.image_bytes))
    store = ChunkStore(folder, {**key, "format": _FORMAT, "rows_at_once": at_once})
    parts = compute(task, dataset.manifest.num_rows, at_once, store, runner, progress)
    found: dict[str, Nearest] = {}
    for part in parts:
        for space in Neighbours._fields:
            nearest = Nearest(*(part[f"{space}.{name}"][0] for name in Nearest._fields))
            found[space] = found[space].closest(nearest, NUM_NEIGHBOURS) if space in found else nearest
    return Neighbours(**found)


class NearestOfRows(Task):
    """The closest of a dataset's images to some others, a chunk of rows at a time, in any worker."""

    def __init__(
        self, dataset: ImageSet, extractor: FeatureExtractor, images: Images, features: npt.NDArray[np.float32]
    ) -> None:
        self._dataset, self._extractor, self._images, self._features = dataset, extractor, images, features

    def start(self, here: Compute) -> None:
        self._extractor.to(here.device)

    def __call__(self, indices: range) -> Arrays:
        """Return distances, rows and contents of the chunk's closest images, [1, q, k] each, in both spaces."""
        rows = np.arange(indices.start, min(indices.stop, self._dataset.manifest.num_rows))
        images = self._dataset.read(rows)
        contents = content_hashes(images)
        first = _firsts(contents)
        rows, images, contents = rows[first], images[first], contents[first]
        by_pixel = _distances(_flat(self._images), _flat(images)) / np.sqrt(images[0].size)
        spaces = {"feature": _distances(self._features, self._extractor(images).features), "pixel": by_pixel}
        arrays: Arrays = {}
        for space, distances in spaces.items():
            order = np.lexsort((np.broadcast_to(rows, distances.shape), distances), axis=1)[:, :NUM_NEIGHBOURS]
            nearest = Nearest(np.take_along_axis(distances, order, axis=1), rows[order], contents[order])
            arrays |= {f"{space}.{name}": array[None] for name, array in nearest._asdict().items()}
        return arrays


def write_neighbours(
    found: Neighbours, generated: Images, dataset: ImageSet, folder: Path, shown: int = 10
) -> list[Path]:
    """Write a sheet of the images closest to a training image by pixel, and all distances as JSON; return the paths."""
    make_folder(folder)
    closest = np.argsort(found.ratios, kind="stable")[:shown]
    columns, labels = [generated[closest]], ["generated"]
    for space, nearest in found._asdict().items():
        for i in range(nearest.rows.shape[1]):
            columns.append(_read(dataset, nearest.rows[closest, i]))
            labels.append(f"{space} {i + 1}")
    paths = [folder / PICTURE_FILE, folder / JSON_FILE]
    save_strip(columns, paths[0], labels)
    about: dict[str, Any] = {
        "dataset": dataset.manifest.fingerprint,
        "memorised_share": found.memorised,
        "shown": closest.tolist(),
        **{
            f"by_{space}": {"distances": nearest.distances.tolist(), "rows": nearest.rows.tolist()}
            for space, nearest in found._asdict().items()
        },
    }
    write_atomically(paths[1], json.dumps(about).encode())
    return paths


def neighbour_lines(found: Neighbours) -> list[str]:
    """Return what the distances show, as lines of text."""
    count, nearest = len(found.ratios), found.pixel.distances[:, 0]
    return [
        f"{found.memorised:.0%} of {count} generated images are all but copies of a training image (less than a third as far, by pixel, "
        f"as the second nearest); the closest is {nearest.min():.1f} grey levels from one, half are within {np.median(nearest):.1f}"
    ]


def _read(dataset: ImageSet, rows: npt.NDArray[np.int64]) -> Images:
    """Read rows in any order, repeats included."""
    unique, inverse = np.unique(rows, return_inverse=True)
    images: Images = dataset.read(unique)[inverse]
    return images


def _firsts(contents: Hashes) -> npt.NDArray[np.int64]:
    """Return the places, ascending, at which each content occurs first."""
    places: npt.NDArray[np.int64] = np.sort(np.unique(contents, return_index=True)[1])
    return places


def _flat(images: Images) -> npt.NDArray[np.float64]:
    return images.reshape(len(images), -1).astype(np.float64)


def _distances(a: npt.ArrayLike, b: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return Euclidean distances [len(a), len(b)], computed from differences: exactly 0 for a copy."""
    left, right = (torch.from_numpy(np.asarray(x, np.float64)) for x in (a, b))
    distances: npt.NDArray[np.float64] = torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    return distances
