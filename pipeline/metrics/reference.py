"""Real images to compare with, and the yardsticks: features extracted once for each dataset and extractor, and cached.

The images are those that the extractor was not fitted on, in the order of their content hash, so that copies of a dataset, in any order or
format, give the same reference. An extractor fitted on the dataset itself (the classifier) gets one half of the rest; one fitted elsewhere
(Inception) gets the whole set, as is usual for FID.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.data.image_set import Images, ImageSet, Progress, Rows
from pipeline.errors import RefusedError
from pipeline.metrics.features import Extracted, FeatureExtractor, concatenate, extract
from pipeline.metrics.fid import Moments
from pipeline.metrics.fit_rule import hash_rows, held_out_rows
from pipeline.metrics.metric_identity import TRAIN
from pipeline.storage.durable import write_atomically
from pipeline.storage.home import make_folder
from pipeline.storage.tensor_file import Arrays, pack, unpack
from pipeline.training.chunks import ChunkStore, Runner, Task, as_it_stands, compute
from pipeline.training.device import Compute, shared_arithmetic

NOISE_SEED = 0

_FORMAT = 2
_NOISE_BATCH = 1000
_ROWS_AT_ONCE = 1024  # a multiple of what the extractors put through their networks at once


@dataclass(frozen=True)
class Reference:
    """Features of real images and of noise, and which images they are.

    Attributes:
        dataset: fingerprint of the real images' dataset.
        split: which part of their source that is.
        num_images: generated images to compare with.
        rule: which real images `real` and `moments` are of, in words.
        moments: of the real images that FID compares with.
        rest: moments of the real images that `other` is compared with: none of them is in `other`.
        real: features of at most `num_images` real images, for metrics that need single images.
        other: features of real images outside `rest`: the yardstick "real_half".
        noise: features of as many uniform noise images: the yardstick "uniform_noise".
    """

    dataset: str
    split: str
    num_images: int
    rule: str
    moments: Moments
    rest: Moments
    real: Extracted
    other: Extracted
    noise: Extracted


def prepare_reference(
    dataset: ImageSet,
    extractor: FeatureExtractor,
    num_images: int,
    cache_dir: Path,
    *,
    split: str = TRAIN,
    computed_on: torch.device | None = None,
    runner: Runner = as_it_stands,
    progress: Progress | None = None,
) -> Reference:
    """Return the reference for a comparison with `num_images` generated images, or as many as the dataset allows.

    The result has the count: with an extractor that was fitted on part of the dataset it is at most half of the rest. `split` names
    the part of its source that the dataset is. `runner` extracts the features of real images on `computed_on`, by default the
    CPU; the result depends on the kind of device, not on the number of workers or threads.

    Raises:
        RefusedError: too few images for the extractor's features, or images that it cannot judge.
    """
    resize = extractor.resize_rule(dataset.manifest.shape)
    if num_images < extractor.min_images:
        raise RefusedError(
            f"{num_images} images are too few for features of width {extractor.width}: FID would be mostly bias; "
            f"ask for at least {extractor.min_images}"
        )
    plan = _Plan.of(dataset, extractor, num_images, progress)
    key = {
        "format": _FORMAT,
        "dataset": dataset.manifest.fingerprint,
        "extractor": [extractor.name, extractor.sha256, resize],
        "counts": [plan.num_real, plan.num_other, len(plan.rows)],
        "rule": plan.rule,
        "noise_seed": NOISE_SEED,
        "arithmetic": shared_arithmetic(computed_on or torch.device("cpu")),
    }
    path = cache_dir / f"reference-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.safetensors"
    arrays = _cached(path, key)
    if arrays is None:
        parts = ChunkStore(cache_dir / "parts", key)
        arrays = _compute(dataset, extractor, plan, parts, runner, progress)
        make_folder(cache_dir)
        write_atomically(path, pack(arrays, key))
        parts.clear()
    return _assemble(dataset.manifest.fingerprint, split, plan, arrays)


@dataclass(frozen=True)
class _Plan:
    """Rows in the order of their content; `real` takes the first ones, `other` the last ones."""

    rows: Rows
    num_images: int
    num_real: int
    num_other: int
    whole: bool
    rule: str

    @classmethod
    def of(cls, dataset: ImageSet, extractor: FeatureExtractor, asked: int, progress: Progress | None) -> _Plan:
        hashes = hash_rows(dataset, progress=progress)
        if extractor.fit_rule is None:
            rows = np.argsort(hashes, kind="stable")
            half = min(asked, len(rows) // 2)
            plan = cls(rows, asked, min(asked, len(rows)), half, True, f"all {len(rows)} images")
        else:
            rows = held_out_rows(hashes, extractor.fit_rule)
            half = min(asked, len(rows) // 2)
            rule = f"first {half} by content of the images not fitted on ({extractor.fit_rule})"
            plan = cls(rows[: 2 * half], half, half, half, False, rule)
        if plan.num_other < extractor.min_images:
            raise RefusedError(
                f"dataset {dataset.manifest.name!r} leaves {plan.num_other} images for each half of the comparison, too few for "
                f"features of width {extractor.width}; at least {extractor.min_images} are needed"
            )
        return plan


class FeaturesOfRows(Task):
    """Features of a dataset's images, a chunk of positions in `rows` at a time, in any worker."""

    def __init__(self, dataset: ImageSet, extractor: FeatureExtractor, rows: Rows) -> None:
        self._dataset, self._extractor, self._rows = dataset, extractor, rows

    def start(self, here: Compute) -> None:
        self._extractor.to(here.device)

    def __call__(self, indices: range) -> Arrays:
        return self._extractor(self._dataset.read(self._rows[indices.start : indices.stop])).to_arrays()


def _compute(
    dataset: ImageSet,
    extractor: FeatureExtractor,
    plan: _Plan,
    store: ChunkStore,
    runner: Runner,
    progress: Progress | None,
) -> Arrays:
    """Read the rows once, in the dataset's order; keep the features that are needed singly, and the moments of all."""
    total, noisy = len(plan.rows), plan.num_other
    rank = np.argsort(plan.rows, kind="stable")  # position by content of each row, the rows ascending
    ascending = plan.rows[rank]
    first_other = total - plan.num_other
    rest, last = Moments.empty(extractor.width), Moments.empty(extractor.width)
    kept: dict[str, list[tuple[Rows, Extracted]]] = {"real": [], "other": []}
    done = 0
    report = None if progress is None else lambda n: progress("features of real images", n, total)
    task = FeaturesOfRows(dataset, extractor, ascending)
    for part in compute(task, total, _ROWS_AT_ONCE, store, runner, report):
        found = Extracted.from_arrays(part)
        ranks = rank[done : done + len(found.features)]
        is_other = ranks >= first_other
        rest, last = rest.add(found.features[~is_other]), last.add(found.features[is_other])
        for name, chosen in (("real", ranks < plan.num_real), ("other", is_other)):
            kept[name].append((ranks[chosen], found.part(chosen)))
        done += len(found.features)
    report = None if progress is None else lambda n: progress("features of noise", n, noisy)
    noise = extract(extractor, _noise(noisy, dataset.manifest.shape), report)
    arrays = rest.to_arrays("rest") | last.to_arrays("last") | noise.to_arrays("noise.")
    for name, parts in kept.items():
        by_content = np.argsort(np.concatenate([ranks for ranks, _ in parts]))
        arrays |= concatenate([p for _, p in parts], extractor).part(by_content).to_arrays(f"{name}.")
    return arrays


def _assemble(fingerprint: str, split: str, plan: _Plan, arrays: Arrays) -> Reference:
    rest, last = (Moments.from_arrays(arrays, name) for name in ("rest", "last"))
    real, other, noise = (Extracted.from_arrays(arrays, f"{name}.") for name in ("real", "other", "noise"))
    moments = rest.merge(last) if plan.whole else rest
    return Reference(fingerprint, split, plan.num_images, plan.rule, moments, rest, real, other, noise)


def _cached(path: Path, key: dict[str, Any]) -> Arrays | None:
    """Return what was cached under exactly this key; None if it is missing or damaged."""
    try:
        found, arrays = unpack(path.read_bytes())
    except (OSError, ValueError):
        return None
    return arrays if found == key else None


def _noise(count: int, shape: tuple[int, int, int]) -> Iterator[Images]:
    """Yield `count` images of independent uniform pixels, from numpy's legacy generator, whose stream never changes."""
    rng = np.random.RandomState(NOISE_SEED)
    for start in range(0, count, _NOISE_BATCH):
        yield rng.randint(0, 256, size=(min(_NOISE_BATCH, count - start), *shape), dtype=np.uint8)
