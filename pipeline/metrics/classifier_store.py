"""Where a dataset's classifier comes from: shipped with the package, cached, or fitted now.

    python -m pipeline.metrics.classifier_store DATASET OUT.safetensors

fits one on an ingested dataset and prints its card; `pipeline/weights/` was made that way (docs/metrics.md has the
commands).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from pipeline.data.image_set import ImageSet, Progress, Rows, row_chunks
from pipeline.data.labels import class_counts, class_names
from pipeline.errors import DataError, RefusedError
from pipeline.metrics.classifier import CONFIDENT, MIN_ACCURACY, MIN_PER_FEATURE, Card, Classifier, Labels, decide, save
from pipeline.metrics.classifier_fit import fit
from pipeline.metrics.features import extract
from pipeline.metrics.fit_rule import FitRule, Hashes, hash_rows, held_out_rows
from pipeline.storage.home import make_folder
from pipeline.training.threads import THREADS

MAX_SIZE = 64
MIN_SIZE = 8

SHIPPED = {
    "digits": "b851a51a71931f0741e596b5b1db27066cc15dff206013e8e25bf38322998b6b",
    "mnist": "5ca486836fcfe74d9f78b0f94192849afdcc2b6f8fa12cf04cabee687ac78e3c",
}
"""Classifiers in `pipeline/weights/`, by file name, with their sha256."""

_RECIPE_FORMAT = 1  # rises with any change to the network or its fitting
_CHECKED_ROWS = 2000
_SKETCH_SIZE = 256
_SKETCH_KNOWN = 16


def classifier_for(
    dataset: ImageSet,
    cache_dir: Path,
    *,
    recipe: Recipe | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Classifier:
    """Return a classifier that may judge this dataset's images: a shipped one, one of `cache_dir`, or one fitted now.

    A shipped one is taken only for a dataset with images that it was fitted on, recognised by content hash whatever the dataset is
    called, and whose other labels it predicts. `recipe` replaces the one that the dataset's size suggests.

    Raises:
        RefusedError: no labels, images of another size than 8 to 64, too few of them, or an accuracy below 0.95.
    """
    suggested = Recipe.for_dataset(dataset)  # which refuses some datasets
    recipe = recipe or suggested
    hashes = hash_rows(dataset, progress=progress)
    shipped = _shipped(dataset, hashes, device)
    if shipped is not None:
        return shipped
    path = cache_dir / f"classifier-{recipe.key(dataset)}.safetensors"
    try:
        classifier = Classifier.load(path, device=device)
    except DataError:  # missing or damaged
        make_folder(cache_dir)
        command = f"python -m pipeline.metrics.classifier_store {shlex.quote(dataset.manifest.name)} {path.name}"
        fit_and_save(dataset, path, recipe=recipe, hashes=hashes, command=command, progress=progress)
        classifier = Classifier.load(path, device=device)
    accuracy = classifier.card.accuracy
    if accuracy < MIN_ACCURACY:
        raise RefusedError(
            f"the classifier of {dataset.manifest.name!r} names {accuracy:.1%} of its {classifier.card.num_held_out} held-out labels, "
            f"expected at least {MIN_ACCURACY:.0%}: its features would mislead; use the inception extractor"
        )
    return classifier


@dataclass(frozen=True)
class Recipe:
    """How a classifier is fitted. A cached one is found by these values."""

    fraction: float
    width: int
    num_steps: int = 2000
    seed: int = 0

    @classmethod
    def for_dataset(cls, dataset: ImageSet) -> Recipe:
        """Choose by size and number of the images; RefusedError if no classifier can judge this dataset."""
        manifest = dataset.manifest
        _, height, width = manifest.shape
        if not manifest.has_labels:
            raise RefusedError(
                f"dataset {manifest.name!r} has no labels, which the classifier is fitted on; use the inception extractor"
            )
        if not MIN_SIZE <= min(height, width) <= max(height, width) <= MAX_SIZE:
            raise RefusedError(
                f"images are {height}x{width}, the classifier takes {MIN_SIZE} to {MAX_SIZE}; use the inception extractor"
            )
        names, counts = class_names(dataset), class_counts(dataset)
        there = [names[number] for number in np.flatnonzero(counts)]
        if len(there) < 2:
            raise RefusedError(
                f"dataset {manifest.name!r} has images of 1 class ({there[0]!r}), the classifier tells 2 or more apart; use the inception "
                "extractor"
            )
        recipe = cls(fraction=min(0.4, 10_000 / manifest.num_rows), width=32 if height * width <= 256 else 64)
        left = manifest.num_rows * (1 - recipe.fraction)
        if left < 2 * MIN_PER_FEATURE * recipe.width:
            raise RefusedError(
                f"dataset {manifest.name!r} has {manifest.num_rows} images, too few to fit a classifier and compare "
                f"{2 * MIN_PER_FEATURE * recipe.width} others; add images or use the inception extractor"
            )
        return recipe

    def key(self, dataset: ImageSet) -> str:
        """Return a name for this recipe on this content."""
        rule = str(FitRule(self.fraction))
        content = json.dumps([_RECIPE_FORMAT, dataset.manifest.fingerprint, asdict(self), rule, {"threads": THREADS}])
        return hashlib.sha256(content.encode()).hexdigest()[:24]


def fit_and_save(
    dataset: ImageSet,
    path: Path,
    *,
    recipe: Recipe,
    hashes: Hashes,
    command: str,
    progress: Progress | None = None,
) -> Card:
    """Fit on the chosen part of a labelled dataset, measure on the rest, and write the file; return its card.

    Its classes are those with images in the chosen part; it is measured on images of these.
    """
    manifest = dataset.manifest
    names = class_names(dataset)
    rule = FitRule(recipe.fraction)
    rows = np.flatnonzero(rule.chosen(hashes))
    rows = rows[np.argsort(hashes[rows], kind="stable")]  # an order that depends on content alone
    labels = _labels(dataset, rows)
    fitted = np.unique(labels)
    if len(fitted) < 2:
        missing = ", ".join(repr(names[n]) for n in np.flatnonzero(class_counts(dataset)) if n not in fitted)
        raise RefusedError(
            f"dataset {manifest.name!r}: the classifier has nothing to fit on of class {missing}; use the inception extractor"
        )
    report = None if progress is None else lambda done, total: progress("fitting the classifier", done, total)
    network = fit(
        dataset.read(rows),
        np.searchsorted(fitted, labels),
        len(fitted),
        width=recipe.width,
        num_steps=recipe.num_steps,
        seed=recipe.seed,
        progress=report,
    )
    unmeasured = Card(
        shape=manifest.shape,
        class_names=tuple(names[number] for number in fitted),
        width=recipe.width,
        rule=rule,
        fitted_on=manifest.name,
        fingerprint=manifest.fingerprint,
        num_fitted=len(rows),
        num_held_out=0,
        accuracy=0.0,
        confident=0.0,
        sketch=tuple(int(h) for h in np.unique(hashes[rows])[:_SKETCH_SIZE]),
        seed=recipe.seed,
        command=command,
        torch=torch.__version__,
    )
    held_out = held_out_rows(hashes, rule)
    held_out = held_out[np.isin(_labels(dataset, held_out), fitted)]
    accuracy, confident = _measure(Classifier(network, unmeasured, ""), dataset, held_out, fitted)
    card = replace(unmeasured, num_held_out=len(held_out), accuracy=accuracy, confident=confident)
    save(network, card, path)
    return card


def _shipped(dataset: ImageSet, hashes: Hashes, device: torch.device | None) -> Classifier | None:
    """Return the shipped classifier that recognises this dataset by the content and the labels of its images, if there is one."""
    for name, sha256 in SHIPPED.items():
        path = Path(__file__).parent.parent / "weights" / f"{name}.safetensors"
        classifier = Classifier.load(path, sha256=sha256, device=device)
        card = classifier.card
        known = np.isin(np.array(card.sketch, dtype=np.uint64), hashes).sum()
        rows = held_out_rows(hashes, card.rule)[:_CHECKED_ROWS]
        if card.shape != dataset.manifest.shape or known < _SKETCH_KNOWN or len(rows) == 0:
            continue
        names = class_names(dataset)
        numbers = np.arange(len(names))
        if len(card.class_names) == len(names) and _measure(classifier, dataset, rows, numbers)[0] >= MIN_ACCURACY:
            classifier.card = replace(card, class_names=names)
            return classifier
    return None


def _measure(classifier: Classifier, dataset: ImageSet, rows: Rows, numbers: Labels) -> tuple[float, float]:
    """Return the share of rows whose label is the first choice, and the share with a confidence above 0.9.

    Choice i of the classifier is the class of number `numbers[i]` of the dataset.
    """
    found = extract(classifier, (dataset.read(chunk) for chunk in row_chunks(dataset, rows)))
    choice, confidence = decide(found)
    return float((numbers[choice] == _labels(dataset, rows)).mean()), float((confidence > CONFIDENT).mean())


def _labels(dataset: ImageSet, rows: Rows) -> Labels:
    labels = dataset.labels(rows)
    assert labels is not None, "labels were checked by Recipe.for_dataset"
    return labels


def main(arguments: list[str]) -> None:
    """Fit a classifier on an ingested dataset, write it, and print its card."""
    from pipeline.data.shards import Dataset

    parser = argparse.ArgumentParser(prog="python -m pipeline.metrics.classifier_store", description=main.__doc__)
    parser.add_argument("dataset", type=Path, help="folder that `ddpm-pipe ingest` wrote")
    parser.add_argument("out", type=Path, help="file to write, .safetensors")
    options = parser.parse_args(arguments)
    dataset = Dataset.open(options.dataset)
    command = shlex.join(["python", "-m", "pipeline.metrics.classifier_store", options.dataset.name, options.out.name])
    recipe = Recipe.for_dataset(dataset)
    card = fit_and_save(dataset, options.out, recipe=recipe, hashes=hash_rows(dataset), command=command)
    digest = hashlib.sha256(options.out.read_bytes()).hexdigest()
    print(json.dumps({"sha256": digest, **{k: v for k, v in asdict(card).items() if k != "sketch"}}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
