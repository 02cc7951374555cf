"""Columns of labels and images in the types that pandas, Polars, Arrow and Hugging Face write, and which column is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.manifest import Manifest
from pipeline.data.shards import Dataset
from pipeline.errors import DataError, UsageError
from pipeline.ingest.ingest import ingest
from tests.kit.data import hugging_face, png_of, some_images, write_npz

ROWS = 12
IMAGES = some_images(ROWS, (6, 6, 1))
PNGS = [png_of(image) for image in IMAGES]
KINDS = [0, 2, 1, 0, 1, 2, 2, 1, 0, 0, 1, 2]
WORDS = ["ant", "cat", "bee", "ant", "bee", "cat", "cat", "bee", "ant", "ant", "bee", "cat"]


def taken(source: Path, **options: Any) -> tuple[Manifest, list[int] | None, list[str]]:
    out, lines = source.parent / f"out-{len(list(source.parent.iterdir()))}", list[str]()
    manifest = ingest(str(source), out, summary=lines.append, **options)
    dataset = Dataset.open(out)
    np.testing.assert_array_equal(dataset.read(range(len(dataset)))[:, 0], IMAGES[: len(dataset), :, :, 0])
    labels = dataset.labels()
    return manifest, None if labels is None else labels.tolist(), lines


def table(path: Path, images: Any = None, **columns: Any) -> Path:
    pq.write_table(pa.table({"image": pa.array(PNGS) if images is None else images, **columns}), path, row_group_size=5)
    return path


@pytest.mark.parametrize(
    ("numbers", "names"),
    [
        ([1, 2, 3], ("1", "2", "3")),
        ([1, 17, 90], ("1", "17", "90")),
        ([5, 6, 2_000_000_000], ("5", "6", "2000000000")),
        ([0, 1, 2], None),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "npz"])
def test_numbers_are_the_names_of_their_classes(tmp_path: Path, kind: str, numbers: list[int], names: Any) -> None:
    labels = [numbers[k] for k in KINDS]
    if kind == "parquet":
        source = table(tmp_path / "x.parquet", category_id=labels)
    else:
        source = write_npz(tmp_path / "x.npz", x=IMAGES, y=np.array(labels))
    manifest, found, lines = taken(source)
    assert (manifest.class_names, found) == (names, KINDS)
    assert f"classes: 3 ({', '.join(f'{n} 4' for n in numbers)})" in lines


TYPES: dict[str, Any] = {
    "int8": pa.array(KINDS, pa.int8()),
    "uint64": pa.array(KINDS, pa.uint64()),
    "pandas Int64": pa.array(pd.array(KINDS, dtype="Int64")),
    "a dictionary of numbers": pa.array(KINDS).dictionary_encode(),
}
TEXTS: dict[str, Any] = {
    "text": pa.array(WORDS),
    "large text": pa.array(WORDS, pa.large_string()),
    "a view": pa.array(WORDS, pa.string_view()),
    "pandas string": pa.array(pd.array(WORDS, dtype="string")),
}
CATEGORIES: dict[str, Any] = {
    "pandas categories": pa.array(pd.Categorical(WORDS)),
    "a dictionary": pa.array(WORDS).dictionary_encode(),
    "a dictionary of large text": pa.array(WORDS, pa.large_string()).dictionary_encode(),
}


@pytest.mark.parametrize("kind", [*TYPES, *CATEGORIES])
def test_labels_are_taken_in_any_type(tmp_path: Path, kind: str) -> None:
    manifest, labels, _ = taken(table(tmp_path / "x.parquet", kind={**TYPES, **CATEGORIES}[kind]))
    assert (manifest.class_names, labels) == (None if kind in TYPES else ("ant", "bee", "cat"), KINDS)


@pytest.mark.parametrize("kind", TEXTS)
def test_text_is_named_first_and_taken_then(tmp_path: Path, kind: str) -> None:
    source = table(tmp_path / "x.parquet", kind=TEXTS[kind])
    manifest, labels, lines = taken(source)
    assert (manifest.has_labels, labels) == (False, None)
    assert f"classes: none; no labels were seen in kind ({TEXTS[kind].type}): name one with --label-column" in lines
    manifest, labels, _ = taken(source, label_column="kind")
    assert (manifest.class_names, labels) == (("ant", "bee", "cat"), KINDS)


def test_truths_are_two_classes(tmp_path: Path) -> None:
    truths = [kind > 0 for kind in KINDS]
    for source in (
        table(tmp_path / "x.parquet", label=truths),
        write_npz(tmp_path / "x.npz", x=IMAGES, y=np.array(truths)),
    ):
        manifest, labels, _ = taken(source)
        assert (manifest.class_names, labels) == (("false", "true"), [int(truth) for truth in truths])


ONE_HOT = np.eye(4, dtype=np.int64)[KINDS]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(ONE_HOT.tolist()),
        pa.array(ONE_HOT.tolist(), pa.list_(pa.float32(), 4)),
        pa.array(ONE_HOT.astype(bool).tolist(), pa.large_list(pa.bool_())),
    ],
    ids=lambda column: str(column.type),
)
def test_one_hot_rows_are_classes(tmp_path: Path, column: Any) -> None:
    """The width says how many classes there are, the last of which has no image here."""
    manifest, labels, lines = taken(table(tmp_path / "x.parquet", label=column))
    assert (manifest.class_names, labels) == (tuple("0123"), KINDS)
    assert "classes without images: 1 (3)" in lines
    manifest, labels, _ = taken(write_npz(tmp_path / "x.npz", x=IMAGES, y=np.array(column.to_pylist())))
    assert (manifest.class_names, labels) == (tuple("0123"), KINDS)


@pytest.mark.parametrize(
    "column", [[[1, 1, 0]] * ROWS, [[0.2, 0.8]] * ROWS, [[1, 0]] * 11 + [[1]], [[1, 0]] * 11 + [None]]
)
def test_lists_that_are_not_one_hot_are_no_labels(tmp_path: Path, column: list[Any]) -> None:
    source = table(tmp_path / "x.parquet", box=column)
    assert not taken(source)[0].has_labels
    with pytest.raises(UsageError, match=r"column 'box' has no labels \(list"):
        taken(source, label_column="box")


def test_fractions_are_labels_when_named_and_whole(tmp_path: Path) -> None:
    source = table(tmp_path / "x.parquet", kind=[float(k) for k in KINDS], score=[0.5] * ROWS)
    assert not taken(source)[0].has_labels
    assert taken(source, label_column="kind")[1] == KINDS
    with pytest.raises(UsageError, match=r"column 'score' has no labels \(double\): columns of labels are none"):
        taken(source, label_column="score")


@pytest.mark.parametrize(
    "images",
    [
        pa.array(PNGS, pa.binary_view()),
        pa.array(PNGS, pa.large_binary()),
        pa.array(PNGS).dictionary_encode(),
        pa.array(
            [{"bytes": png, "path": None} for png in PNGS], pa.struct({"bytes": pa.binary(), "path": pa.string()})
        ),
        pa.array([{"bytes": png} for png in PNGS], pa.struct({"bytes": pa.large_binary()})),
    ],
    ids=lambda column: str(column.type)[:20],
)
def test_images_are_taken_in_any_type(tmp_path: Path, images: Any) -> None:
    assert taken(table(tmp_path / "x.parquet", images, label=KINDS))[1] == KINDS


def test_what_pandas_writes(tmp_path: Path) -> None:
    frame = pd.DataFrame({"image": PNGS, "label": pd.Categorical(WORDS)})
    frame.index += 7
    frame.to_parquet(tmp_path / "whole.parquet")
    assert taken(tmp_path / "whole.parquet")[1] == KINDS
    frame["keep"] = [True] * 11 + [False]
    frame[frame.keep].to_parquet(tmp_path / "part.parquet")  # with __index_level_0__
    assert taken(tmp_path / "part.parquet")[1] == KINDS[:11]
    frame[["image"]][frame.keep].to_parquet(tmp_path / "bare.parquet")
    assert not taken(tmp_path / "bare.parquet")[0].has_labels
    halves = pd.concat([frame[["image"]][:6].reset_index(drop=True), frame[["image"]][6:].reset_index(drop=True)])
    halves.to_parquet(tmp_path / "twice.parquet")  # an index in which each number comes twice
    assert not taken(tmp_path / "twice.parquet")[0].has_labels


def test_a_column_that_names_each_row_once_is_no_label(tmp_path: Path) -> None:
    ids = [7 * row + 100 for row in range(ROWS)]
    manifest, _, lines = taken(table(tmp_path / "x.parquet", image_id=ids))
    assert not manifest.has_labels
    assert "classes: none; no labels were seen in image_id (int64): name one with --label-column" in lines
    assert taken(table(tmp_path / "y.parquet", image_id=ids, kind=KINDS))[1] == KINDS
    named, labels, _ = taken(tmp_path / "x.parquet", label_column="image_id")
    assert (named.class_names, labels) == (tuple(map(str, ids)), list(range(ROWS)))
    assert not taken(write_npz(tmp_path / "x.npz", x=IMAGES, ids=np.array(ids)))[0].has_labels


def test_of_several_the_one_that_is_called_so_is_taken_and_named(tmp_path: Path) -> None:
    _, labels, lines = taken(table(tmp_path / "x.parquet", width=[28, 32] * 6, label=KINDS, flag=[True, False] * 6))
    assert labels == KINDS
    assert "columns: images in 'image', labels in 'label' (not in width, flag)" in lines
    with pytest.raises(UsageError, match=r"several columns of labels \(width, flag\)"):
        taken(table(tmp_path / "y.parquet", width=[28, 32] * 6, flag=[True, False] * 6))


def test_declared_names_that_do_not_occur_stay(tmp_path: Path) -> None:
    source = table(tmp_path / "x.parquet", label=KINDS)
    features = {"label": {"_type": "ClassLabel", "names": ["ant", "bee", "cat", "dog"]}}
    pq.write_table(pq.read_table(source).replace_schema_metadata(hugging_face(features)), source)
    manifest, labels, lines = taken(source)
    assert (manifest.class_names, labels) == (("ant", "bee", "cat", "dog"), KINDS)
    assert "classes without images: 1 (dog)" in lines


def test_labels_of_hive_paths(tmp_path: Path) -> None:
    images = {kind: [png for png, k in zip(PNGS, KINDS, strict=True) if k == kind] for kind in (0, 1, 2)}
    for form, names in (
        (lambda k: k, None),
        (lambda k: k + 1, ("1", "2", "3")),
        (lambda k: f"a b{k}", ("a b0", "a b1", "a b2")),
    ):
        root = tmp_path / f"in-{form(0)}"
        pq.write_to_dataset(
            pa.table({"image": PNGS, "label": [form(kind) for kind in KINDS]}), root, partition_cols=["label"]
        )
        out = tmp_path / f"out-{form(0)}"
        manifest = ingest(str(root), out)
        assert manifest.class_names == names
        labels = Dataset.open(out).labels()
        assert labels is not None
        assert labels.tolist() == sorted(KINDS)
    root = tmp_path / "split"
    pq.write_to_dataset(
        pa.table({"image": PNGS, "label": KINDS, "split": ["train", "test"] * 6}),
        root,
        partition_cols=["split", "label"],
    )
    assert (
        ingest(str(root), tmp_path / "train").num_rows
        == ingest(str(root), tmp_path / "test", split="test").num_rows
        == 6
    )
    assert images.keys() == {0, 1, 2}


def test_missing_labels_and_images_are_named(tmp_path: Path) -> None:
    source = table(tmp_path / "x.parquet", label=pa.array([*WORDS[:11], None]).dictionary_encode())
    with pytest.raises(DataError, match=r"row 11 has no label"):
        taken(source)
    source = table(tmp_path / "y.parquet", pa.array([*PNGS[:11], None]), label=KINDS)
    with pytest.raises(DataError, match=r"row 11 has no image bytes"):
        taken(source)
    assert taken(source, skip_damaged=1)[1] == KINDS[:11]


def test_the_generated_set_can_be_ingested(tmp_path: Path) -> None:
    """Raw rows with their shape in the schema, as `sample --format parquet` writes them; without it they are no images."""
    width = IMAGES[0].size
    raw = pa.array([image.tobytes() for image in IMAGES], pa.binary(width))
    source = table(tmp_path / "x.parquet", raw, label=KINDS)
    with pytest.raises(
        DataError, match=rf"no column of images, its columns are image \(fixed_size_binary\[{width}\]\)"
    ):
        taken(source)
    features = {
        "image": {"_type": "Value", "dtype": "binary"},
        "label": {"_type": "ClassLabel", "names": ["b", "a", "c"]},
    }
    metadata = {b"shape": b"1x6x6", b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(pq.read_table(source).replace_schema_metadata(metadata), source)
    manifest, labels, _ = taken(source)
    assert (manifest.class_names, labels) == (("b", "a", "c"), KINDS)
