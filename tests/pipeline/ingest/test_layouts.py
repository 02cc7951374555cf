"""Image folders as people lay them out: wrappers, splits, classes, and what systems leave in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.config.experiment import DataConfig
from pipeline.data.manifest import Manifest
from pipeline.data.shards import Dataset
from pipeline.errors import DataError, UsageError
from pipeline.ingest.ingest import ensure_ingested, ingest
from tests.kit.data import png_of, some_images

IMAGES = some_images(60, (6, 6, 1))


def lay_out(root: Path, *paths: str) -> Path:
    """Write different images at these paths below `root`; other files are a byte."""
    for number, path in enumerate(paths):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png_of(IMAGES[number]) if file.suffix in (".png", ".JPEG") else b"x")
    return root


def taken(root: Path, split: str | None = None, layout: str | None = None) -> tuple[Manifest, list[int], list[str]]:
    """Ingest, and return the manifest, labels, and the lines told in the end."""
    lines: list[str] = []
    out = root.parent / f"out-{len(list(root.parent.iterdir()))}"
    manifest = ingest(str(root), out, split=split, layout=layout, summary=lines.append)
    labels = Dataset.open(out).labels()
    return manifest, [] if labels is None else labels.tolist(), lines


FOUR = ("a/0.png", "a/1.png", "b/2.png", "b/3.png")


@pytest.mark.parametrize("wrapper", ["images", "flowers/jpg", "train", "dataset/train/images"])
def test_a_folder_around_all_images_is_no_class(tmp_path: Path, wrapper: str) -> None:
    flat, _, _ = taken(lay_out(tmp_path / "flat", "0.png", "1.png", "2.png"))
    found, labels, lines = taken(lay_out(tmp_path / "in", *(f"{wrapper}/{i}.png" for i in range(3))))
    assert (found.class_names, labels, found.fingerprint) == (None, [], flat.fingerprint)
    assert any(wrapper in line or "train taken" in line for line in lines)
    assert "classes: none (no sub-folders)" in lines


def test_a_folder_around_class_folders_is_passed_through(tmp_path: Path) -> None:
    plain, _, _ = taken(lay_out(tmp_path / "plain", *FOUR))
    found, labels, lines = taken(lay_out(tmp_path / "in", *(f"set/{path}" for path in FOUR), "set.csv"))
    assert (found.class_names, labels, found.fingerprint) == (("a", "b"), [0, 0, 1, 1], plain.fingerprint)
    assert "classes: 2 (a 2, b 2)" in lines
    assert "ignored: set.csv (1 file)" in lines


SPLITS = [
    ("train", "val", "test"),
    ("train2017", "val2017", "test2017"),
    ("Training", "Validation", "Testing"),
    ("training_set", "validation_set", "test_set"),
    ("trainset", "valset", "testset"),
    ("train_images", "val_images", "test_images"),
    ("seg_train", "seg_dev", "seg_test"),
    ("letters_train", "letters_valid", "letters_test"),
    ("split=train", "split=val", "split=test"),
]


@pytest.mark.parametrize("names", SPLITS, ids=lambda names: names[0])
def test_top_folders_that_are_all_named_for_splits_are_splits(tmp_path: Path, names: tuple[str, ...]) -> None:
    root = lay_out(tmp_path / "in", *(f"{name}/{cls}/{i}.png" for name in names for i, cls in enumerate("aabb")))
    lay_out(root, "annotations/instances.json", "README.md")
    for split, number in ((None, 0), ("train", 0), ("validation", 1), ("test", 2), (names[1], 1)):
        found, labels, lines = taken(root, split)
        assert (found.num_rows, found.class_names, labels) == (4, ("a", "b"), [0, 0, 1, 1])
        assert found.source == str(root / names[number])
        others = ", ".join(f"{name} 4" for name in sorted(names) if name != names[number])
        assert f"splits: {names[number]} taken (4 images); not taken: {others}" in lines
        assert "ignored: README.md (1 file), annotations (1 file)" in lines


@pytest.mark.parametrize(
    "names", [("bus", "car", "train"), ("test_strip", "test_tube"), ("valley", "trail"), ("tested", "untested")]
)
def test_classes_may_be_called_like_splits(tmp_path: Path, names: tuple[str, ...]) -> None:
    found, _, _ = taken(lay_out(tmp_path / "in", *(f"{name}/0.png" for name in names)))
    assert found.class_names == tuple(sorted(names))


def test_splits_inside_each_class(tmp_path: Path) -> None:
    root = lay_out(tmp_path / "in", *(f"{c}/{s}/{i}.png" for c in "ab" for s in ("test", "train") for i in range(2)))
    found, labels, lines = taken(root)
    assert (found.num_rows, found.class_names, labels) == (4, ("a", "b"), [0, 0, 1, 1])
    assert "splits, inside each class: train taken (4 images); not taken: test 4" in lines
    assert taken(root, "test")[0].fingerprint != found.fingerprint


def test_splits_of_two_sets_at_once_must_be_told_apart(tmp_path: Path) -> None:
    root = lay_out(tmp_path / "in", *(f"{name}/0.png" for name in ("trainA", "trainB", "testA", "testB")))
    with pytest.raises(UsageError, match=r"splits of several sets, or classes \(testA, testB, trainA, trainB\)"):
        taken(root)
    assert taken(root, layout="classes")[0].class_names == ("testA", "testB", "trainA", "trainB")
    root = lay_out(tmp_path / "years", "train2014/0.png", "train2017/0.png", "val2017/0.png")
    with pytest.raises(UsageError, match=r"several folders of split 'train' \(train2014, train2017\): name one"):
        taken(root)
    assert taken(root, "train2017")[0].source.endswith("train2017")


LITTER = [
    "@eaDir/0.png",
    "a/@eaDir/0.png/SYNOPHOTO_THUMB_M.png",
    "lost+found/x",
    ".DS_Store",
    "a/.DS_Store",
    "a/._0.png",
    "Thumbs.db",
    "b/Thumbs.db",
    "desktop.ini",
    "__MACOSX/a/._0.png",
    "#recycle/0.png",
    "$RECYCLE.BIN/0.png",
    "System Volume Information/x",
    ".ipynb_checkpoints/0.png",
]


def test_what_systems_leave_in_folders_is_skipped_and_named(tmp_path: Path) -> None:
    clean, _, _ = taken(lay_out(tmp_path / "clean", *FOUR))
    found, _, lines = taken(lay_out(lay_out(tmp_path / "in", *FOUR), *(f"{path}" for path in LITTER)))
    assert (found.class_names, found.num_rows) == (clean.class_names, 4)
    (line,) = (line for line in lines if line.startswith("ignored: "))
    assert {path.split("/")[0] for path in LITTER if path[:2] not in ("a/", "b/")} <= set(
        line[9:].replace(" (1 file)", "").replace(" (2 files)", "").split(", ")
    )
    assert ".DS_Store (2 files)" in line
    assert "@eaDir (2 files)" in line


def test_a_folder_that_only_its_owner_may_read_is_no_obstacle(tmp_path: Path) -> None:
    root = lay_out(tmp_path / "in", *FOUR, "lost+found/x")
    (root / "lost+found").chmod(0)
    assert taken(root)[0].class_names == ("a", "b")
    (root / "lost+found").chmod(0o700)


def test_hive_names_are_values(tmp_path: Path) -> None:
    found, labels, _ = taken(lay_out(tmp_path / "in", "label=3/0.png", "label=a%20b/1.png", "label=3/2.png"))
    assert (found.class_names, labels) == (("3", "a b"), [0, 0, 1])


def test_layout_says_otherwise(tmp_path: Path) -> None:
    root = lay_out(tmp_path / "in", "train/0.png", "val/1.png", "train/2.png")
    assert taken(root)[0].num_rows == 2
    flat, labels, _ = taken(root, layout="flat")
    assert (flat.num_rows, flat.class_names, labels) == (3, None, [])
    classes, labels, _ = taken(root, layout="classes")
    assert (classes.class_names, labels) == (("train", "val"), [0, 0, 1])
    mixed = lay_out(tmp_path / "mixed", "0.png", "a/1.png")
    with pytest.raises(DataError, match=r"both beside and inside sub-folders: .*--layout flat"):
        taken(mixed)
    assert taken(mixed, layout="flat")[0].num_rows == 2
    odd = lay_out(tmp_path / "odd", "holdout/0.png", "train/1.png", "train/2.png")
    assert taken(odd)[0].class_names == ("holdout", "train")
    assert taken(odd, "holdout", "splits")[0].num_rows == 1
    for layout, message in (("deep", "expected .flat., .classes. or .splits."), ("flat", "leave one out")):
        with pytest.raises(UsageError, match=message):
            taken(root, "train", layout)
    with pytest.raises(UsageError, match="--layout is for folders of image files, got digits"):
        ingest("digits", tmp_path / "d", layout="flat")


def test_other_readings_of_a_folder_are_other_datasets_in_the_cache(tmp_path: Path) -> None:
    root, cache = str(lay_out(tmp_path / "in", *FOUR)), tmp_path / "cache"
    found = [
        ensure_ingested(DataConfig(source=root, layout=layout), cache) for layout in (None, "flat", "classes", None)
    ]
    assert [dataset.manifest.has_labels for dataset in found] == [True, False, True, True]
    assert found[0].location == found[3].location


# -- damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.fault(10)
@pytest.mark.promise("P3")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_damaged_images_are_listed_at_once_and_left_out_when_so_many_may_be(tmp_path: Path, num_workers: int) -> None:
    """The first chunk of images is damaged altogether."""
    root = lay_out(tmp_path / "in")
    root.mkdir()
    images = some_images(600, (6, 6, 1))
    bad = [*range(256), 300, 599]
    for row, image in enumerate(images):
        data = png_of(image)
        (root / f"{row:03}.png").write_bytes(data[:-20] if row in bad else data)
    with pytest.raises(
        DataError,
        match=r"258 of 600 images are damaged: .*000\.png: a damaged PNG image \(Truncated File Read\); .*; and 238 more: ",
    ) as error:
        ingest(str(root), tmp_path / "out", num_workers=num_workers)
    assert "--skip-damaged 258" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="more than the 257 of --skip-damaged"):
        ingest(str(root), tmp_path / "out", num_workers=num_workers, skip_damaged=257)
    lines: list[str] = []
    manifest = ingest(str(root), tmp_path / "out", num_workers=num_workers, skip_damaged=258, summary=lines.append)
    np.testing.assert_array_equal(
        Dataset.open(tmp_path / "out").read(range(342))[:, 0], np.delete(images, bad, axis=0)[..., 0]
    )
    assert [Path(line.partition(":")[0]).name for line in manifest.skipped] == [f"{row:03}.png" for row in bad]
    assert Manifest.load(tmp_path / "out") == manifest
    start = lines.index("left out: 258 damaged images")
    assert (len(lines[start + 1 :]), lines[-1]) == (21, "  and 238 more, in the manifest")


@pytest.mark.fault(12)
def test_a_refused_image_is_not_skipped(tmp_path: Path) -> None:
    root = lay_out(tmp_path / "in", "0.png")
    (root / "1.png").write_bytes(b"GIF89a")
    with pytest.raises(DataError, match=r"1\.png: a GIF file, expected a PNG or JPEG image"):
        ingest(str(root), tmp_path / "out", skip_damaged=5)
