"""A share of the images is held out at ingest, by content: the two parts are the whole, and any copy of an image falls on one side."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.experiment import FREE_TO_CHANGE, DataConfig, Experiment, differences, with_overrides
from pipeline.data.manifest import ContentHash
from pipeline.data.order import Order
from pipeline.data.shards import Dataset
from pipeline.errors import UsageError
from pipeline.ingest.ingest import availability, ensure_ingested, held_out_location


def contents(dataset: Dataset) -> list[tuple[bytes, int]]:
    """Return the digest and the label of each row, in order."""
    labels = dataset.labels()
    assert labels is not None
    images = dataset.read(np.arange(len(dataset)))
    return [(ContentHash.of_row(i.tobytes()), int(label)) for i, label in zip(images, labels, strict=True)]


def parts_of(source: str, folder: Path, holdout: float) -> tuple[Dataset, Dataset]:
    """Ingest without the share; return the images to train on and those held out."""
    rest = ensure_ingested(DataConfig(source=source), folder, holdout=holdout)
    return rest, Dataset.open(held_out_location(rest.location))


def test_held_out_images_leave_and_the_rest_keep_their_order(tmp_path: Path, dataset: Dataset) -> None:
    rest, held_out = parts_of("digits", tmp_path, 0.1)
    everything, kept, left = contents(dataset), contents(rest), contents(held_out)
    chosen = {
        digest
        for digest, _ in everything
        if int.from_bytes(hashlib.sha256(b"ddpm-pipe holdout 1" + digest).digest()[:8], "big") / 2**64 < 0.1
    }
    assert kept == [row for row in everything if row[0] not in chosen]
    assert left == [row for row in everything if row[0] in chosen]
    assert abs(len(left) - 179.7) < 4 * np.sqrt(1797 * 0.1 * 0.9)
    assert rest.manifest.class_names == held_out.manifest.class_names == dataset.manifest.class_names
    rest.verify()
    held_out.verify()
    # row groups are formed from the rest, and the order is the documented function of them
    assert sum(rest.manifest.row_groups) == len(kept)
    assert Order(rest.manifest.row_groups, 0, 4, 32, 64).num_rows == len(kept)
    found = availability(DataConfig(), tmp_path, 0.1)
    assert (found.state, found.num_rows, found.fingerprint) == ("cached", len(kept), rest.manifest.fingerprint)


def test_any_copy_of_an_image_falls_on_the_same_side(tmp_path: Path, dataset: Dataset) -> None:
    """From an ingested dataset, and from another file in another order; a larger share holds out those of a smaller one."""
    tenth, held_out = parts_of("digits", tmp_path / "a", 0.1)
    again, left = parts_of(str(dataset.folder), tmp_path / "b", 0.1)
    assert again.manifest.fingerprint == tenth.manifest.fingerprint
    assert left.manifest.fingerprint == held_out.manifest.fingerprint
    images = dataset.read(np.arange(len(dataset)))[::-1]
    np.savez(tmp_path / "digits.npz", images=images[:, 0], labels=dataset.labels()[::-1])
    _, reversed_part = parts_of(str(tmp_path / "digits.npz"), tmp_path / "c", 0.1)
    assert contents(reversed_part) == contents(held_out)[::-1]
    _, third = parts_of("digits", tmp_path / "a", 0.3)
    assert set(contents(held_out)) < set(contents(third))


def test_without_a_holdout_the_dataset_is_that_of_before(tmp_path: Path, dataset: Dataset) -> None:
    whole = ensure_ingested(DataConfig(), tmp_path, holdout=0.0)
    assert whole.folder.name == dataset.folder.name == "digits-7c18f79d9329"
    assert whole.manifest == dataset.manifest


def test_a_share_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    one = np.zeros((1, 8, 8), np.uint8)
    np.savez(tmp_path / "one.npz", images=one)
    for share, what in ((0.0001, "validate"), (0.4, "train on|validate")):
        with pytest.raises(
            UsageError, match=f"validation.holdout: got {share}, of which 1 images leave none to ({what})"
        ):
            parts_of(str(tmp_path / "one.npz"), tmp_path / "datasets", share)
    assert not list((tmp_path / "datasets").glob("one*"))


def test_a_holdout_is_part_of_the_experiment_and_other_settings_of_validation_are_not() -> None:
    plain = Experiment()
    free = with_overrides(plain, ["validation.split=test", "validation.every_steps=7", "validation.num_images=9"])
    held = with_overrides(plain, ["validation.holdout=0.1"])
    assert free.hash("images") == plain.hash("images") != held.hash("images")
    assert differences(plain, free) == []
    assert differences(plain, held) == ["validation.holdout: 0.0 -> 0.1"]
    # the hash of an experiment without a holdout is as if there were no such setting
    left_out = (*FREE_TO_CHANGE, "data.source", "validation.")
    kept = {key: value for key, value in plain.flat().items() if not key.startswith(left_out)}
    text = json.dumps(kept | {"dataset": "images"}, sort_keys=True)
    assert plain.hash("images") == hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["validation.split=test", "validation.holdout=0.1"], "split and holdout: got 'test' and 0.1, expected one"),
        (["validation.split=train"], "'train', whose images are trained on"),
        (["validation.split=test", "data.split=all"], "'test', whose images are trained on"),
        (["validation.holdout=0.6"], "holdout"),
    ],
)
def test_images_that_are_trained_on_do_not_validate(settings: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        with_overrides(Experiment(), settings)
