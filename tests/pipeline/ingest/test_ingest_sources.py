"""Each kind of source on small files of its true form, whole and damaged."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import pickle
import random
import shutil
import socket
import struct
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.cluster_profile import Profile
from pipeline.config.context import Context
from pipeline.config.experiment import DataConfig
from pipeline.data.manifest import Manifest
from pipeline.data.shards import Dataset
from pipeline.errors import DataError, PipelineError, UsageError
from pipeline.ingest.download import Archive, fetch
from pipeline.ingest.files import find_files, without_credentials
from pipeline.ingest.ingest import availability, ensure_ingested, ingest
from pipeline.ingest.resolve import absolute_source
from pipeline.ingest.sets import SETS
from pipeline.runs.train import train_request
from tests.kit.data import (
    Pixels,
    hugging_face,
    png_of,
    some_images,
    write_folder,
    write_npz,
    write_parquet,
)

NAMES = ("ant", "bee", "cat")
LABELS = [0] * 4 + [1] * 5 + [2] * 3


def chw(images: Pixels) -> Pixels:
    return images.transpose(0, 3, 1, 2)


def assert_holds(folder: Path, images: Pixels, labels: Any = None) -> None:
    dataset = Dataset.open(folder)
    np.testing.assert_array_equal(dataset.read(range(len(dataset))), chw(images))
    if labels is None:
        assert dataset.labels() is None
    else:
        np.testing.assert_array_equal(dataset.labels(), labels)


# -- image folders --------------------------------------------------------------------------------------------------------


def test_a_flat_folder_has_no_labels_and_is_sorted_by_name(tmp_path: Path) -> None:
    images = some_images(3)
    root = tmp_path / "in"
    root.mkdir()
    for name, image in zip(("b.PNG", "a.png", "C.png"), images, strict=True):
        (root / name).write_bytes(png_of(image))
    (root / ".DS_Store").write_bytes(b"x")
    (root / "Thumbs.db").write_bytes(b"x")
    manifest = ingest(str(root), tmp_path / "out")
    assert (manifest.class_names, manifest.has_labels) == (None, False)
    assert_holds(tmp_path / "out", images[[2, 1, 0]])


def test_sub_folders_are_classes_and_may_be_deeper(tmp_path: Path) -> None:
    images = some_images(12)
    root = write_folder(tmp_path / "in", images, LABELS, NAMES)
    (root / "bee" / "hive").mkdir()
    (root / "bee" / "00008.png").rename(root / "bee" / "hive" / "00008.png")
    manifest = ingest(str(root), tmp_path / "out")
    assert manifest.class_names == NAMES
    assert_holds(tmp_path / "out", images, LABELS)


def test_sub_folders_named_for_splits_are_splits(tmp_path: Path) -> None:
    images = some_images(12)
    for split in ("train", "val", "test"):
        write_folder(tmp_path / "in" / split, images[: {"train": 12, "val": 6, "test": 5}[split]], LABELS, NAMES)
    counts = {
        split: ingest(str(tmp_path / "in"), tmp_path / f"out-{split}", split=split).num_rows
        for split in (None, "train", "validation", "val", "test")
    }
    assert counts == {None: 12, "train": 12, "validation": 6, "val": 6, "test": 5}
    for split, message in (
        ("holdout", "give one of train, validation, test, all"),
        ("all", "cannot be combined"),
    ):
        with pytest.raises(UsageError, match=message):
            ingest(str(tmp_path / "in"), tmp_path / "out", split=split)


def test_a_class_may_be_named_train(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", some_images(12), LABELS, ("bus", "car", "train"))
    assert ingest(str(tmp_path / "in"), tmp_path / "out").class_names == ("bus", "car", "train")
    with pytest.raises(UsageError, match=r"has no split 'train': its sub-folders are bus, car, train"):
        ingest(str(tmp_path / "in"), tmp_path / "other", split="train")


@pytest.mark.fault(10)
def test_what_does_not_belong_into_an_image_folder_is_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "in", some_images(12), LABELS, NAMES)
    cases: list[tuple[str, bytes, str]] = [
        ("bee/notes.txt", b"text", r"bee/notes\.txt has another suffix than PNG and JPEG images"),
        ("bee/text.png", b"text", r"bee/text\.png: a file that starts with b'text', expected a PNG or JPEG"),
        ("bee/photo.webp", b"RIFF", r"photo\.webp has another suffix than PNG and JPEG images"),
        ("beside.png", png_of(some_images(1)[0]), "has images both beside and inside sub-folders"),
    ]
    for name, data, message in cases:
        (root / name).write_bytes(data)
        with pytest.raises(DataError, match=message):
            ingest(str(root), tmp_path / "out")
        (root / name).unlink()
    (root / "dog").mkdir()
    with pytest.raises(DataError, match="in/dog has no image"):
        ingest(str(root), tmp_path / "out")
    with pytest.raises(UsageError, match="which have no columns"):
        ingest(str(root), tmp_path / "out", image_column="x")


# -- .npz -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 8, 6), (1, 8, 6)),
        ((5, 8, 6, 1), (1, 8, 6)),
        ((5, 8, 6, 3), (3, 8, 6)),
        ((5, 3, 8, 6), (3, 8, 6)),
        ((5, 8, 6, 4), (4, 8, 6)),
    ],
)
def test_layouts_of_arrays(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, int, int]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    source = write_npz(tmp_path / "x.npz", anything=array, classes=np.arange(5)[:, None])
    assert ingest(str(source), tmp_path / "out").shape == expected
    first = array[:, :, :, None] if array.ndim == 3 else array.transpose(0, 2, 3, 1) if shape[1] == 3 else array
    assert_holds(tmp_path / "out", first, range(5))


def test_arrays_are_chosen_by_split_and_by_name(tmp_path: Path) -> None:
    images = some_images(9)
    keras = write_npz(tmp_path / "k.npz", x_train=images[:5], y_train=range(5), x_test=images[5:], y_test=range(4))
    assert ingest(str(keras), tmp_path / "a").num_rows == 5
    assert ingest(str(keras), tmp_path / "b", split="test").num_rows == 4
    assert_holds(tmp_path / "b", images[5:], range(4))
    two = write_npz(tmp_path / "two.npz", a=images, b=images[::-1], y=range(9), z=range(9))
    with pytest.raises(UsageError, match=r"several columns of images \(a, b\): name one with --image-column"):
        ingest(str(two), tmp_path / "c")
    with pytest.raises(UsageError, match=r"several columns of labels \(y, z\): name one with --label-column"):
        ingest(str(two), tmp_path / "c", image_column="b")
    with pytest.raises(UsageError, match=r"column 'y' has no images \(int64\): columns of images are a, b"):
        ingest(str(two), tmp_path / "c", image_column="y")
    ingest(str(two), tmp_path / "c", image_column="b", label_column="z")
    assert_holds(tmp_path / "c", images[::-1], range(9))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((3, 4, 4), dtype=np.float32)}, r"has no column of images, its columns are x"),
        ({"x": np.zeros((3, 9, 8, 7), dtype=np.uint8)}, r"has shape \(3, 9, 8, 7\), expected \[N, H, W\]"),
        ({"x": np.zeros((0, 4, 4), dtype=np.uint8)}, "has no images, expected one at least"),
        ({"x": np.zeros((2, 4, 4), dtype=np.uint8), "y": np.array([0, -1])}, r"y, row 1: label -1, expected 0 or more"),
        ({"x": np.array([{}], dtype=object)}, "has no column of images"),
        ({"x": np.zeros((2, 70, 70, 4), dtype=np.uint8)}, "images above 64x64 need 1 or 3 channels"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ingest(str(write_npz(tmp_path / "x.npz", **arrays)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 32, 32)}",  # more than the file holds
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 8, 8)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': " + "9" * 5000,
        "(" * 3000,
        "\0" * 50,
        "",
    ],
)
def test_a_damaged_header_of_an_array_is_one_line(tmp_path: Path, header: str) -> None:
    content = b"\x93NUMPY\x02\x00" + (len(header) or 2**31 - 1).to_bytes(4, "little") + header.encode() + bytes(100)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", content)
    with pytest.raises(DataError, match=r"x\.npz is not a readable \.npz file .*: replace it$") as error:
        ingest(str(tmp_path / "x.npz"), tmp_path / "out")
    assert len(str(error.value)) < 500 + len(str(tmp_path))


# -- Parquet --------------------------------------------------------------------------------------------------------------


def test_hugging_face_files_whatever_the_columns_are_called(tmp_path: Path) -> None:
    images = some_images(12)
    source = write_parquet(tmp_path / "x.parquet", images, LABELS, NAMES, image="img", label="fine")
    manifest = ingest(str(source), tmp_path / "out")
    assert manifest.class_names == NAMES
    assert_holds(tmp_path / "out", images, LABELS)


def binary_table(images: Pixels, **columns: Any) -> pa.Table:
    return pa.table({"png": pa.array([png_of(image) for image in images], type=pa.large_binary()), **columns})


def test_columns_are_found_by_type(tmp_path: Path) -> None:
    images = some_images(12)
    table = binary_table(images, caption=["text"] * 12, score=[0.5] * 12, kind=pa.array(LABELS, type=pa.uint8()))
    pq.write_table(table, tmp_path / "x.parquet")
    assert ingest(str(tmp_path / "x.parquet"), tmp_path / "out").class_names is None
    assert_holds(tmp_path / "out", images, LABELS)


def test_several_columns_must_be_named(tmp_path: Path) -> None:
    images, source = some_images(12), tmp_path / "x.parquet"
    other = pa.array([png_of(image) for image in images[::-1]])
    table = binary_table(images, mask=other, part=[0, 1] * 6, kind=LABELS)
    pq.write_table(table, source)
    with pytest.raises(UsageError, match=r"several columns of images \(png, mask\): name one with --image-column"):
        ingest(str(source), tmp_path / "out")
    with pytest.raises(UsageError, match=r"several columns of labels \(part, kind\): name one with --label-column"):
        ingest(str(source), tmp_path / "out", image_column="mask")
    with pytest.raises(UsageError, match=r"column 'nose' does not exist: columns of images are png, mask"):
        ingest(str(source), tmp_path / "out", image_column="nose")
    ingest(str(source), tmp_path / "out", image_column="mask", label_column="kind")
    assert_holds(tmp_path / "out", images[::-1], LABELS)
    features = {"mask": {"_type": "Image"}, "kind": {"_type": "ClassLabel", "names": list(NAMES)}}
    pq.write_table(table.replace_schema_metadata(hugging_face(features)), source)  # declared: no doubt left
    assert ingest(str(source), tmp_path / "declared").class_names == NAMES
    assert_holds(tmp_path / "declared", images[::-1], LABELS)


def test_labels_of_text_are_taken_when_named(tmp_path: Path) -> None:
    images, source = some_images(4), tmp_path / "in"
    source.mkdir()
    for file, words in (("a", ["dog", "ant"]), ("b", ["cow", "dog"])):
        half = images[:2] if file == "a" else images[2:]
        pq.write_table(binary_table(half, kind=words), source / f"{file}.parquet")
    assert not ingest(str(source), tmp_path / "plain").has_labels
    assert ingest(str(source), tmp_path / "named", label_column="kind").class_names == ("ant", "cow", "dog")
    assert_holds(tmp_path / "named", images, [2, 0, 1, 2])


def test_folders_globs_splits_and_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = some_images(12)
    for i, name in enumerate(("data/train-00000", "data/train-00001", "data/test-00000", "_tmp/x", ".git/x")):
        write_parquet(tmp_path / "in" / f"{name}-of-2.parquet", images[i : i + 2], [0, 1], NAMES)
    (tmp_path / "in" / "README.md").write_text("a dataset")
    monkeypatch.chdir(tmp_path)

    def rows(source: str, split: str | None = None) -> list[int]:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        ingest(source, tmp_path / "out", split=split)
        found = Dataset.open(tmp_path / "out")
        stored = [image.tobytes() for image in chw(images)]
        return [stored.index(image.tobytes()) for image in found.read(range(len(found)))]

    assert rows("in") == rows("in", "train") == rows("in/data") == rows(f"{tmp_path}/in") == [0, 1, 1, 2]
    assert rows("in", "test") == rows("in/data/test-00000-of-2.parquet") == [2, 3]
    assert rows("in", "all") == [2, 3, 0, 1, 1, 2]  # by path
    assert rows("in/*/train-*.parquet") == rows("in/**/train-*.parquet") == rows("*/data/train-0000[01]*.parquet")
    assert rows("in/data/*00001*.parquet") == [1, 2]
    assert rows(f"file://{tmp_path}/in/data") == rows(f"file://{tmp_path}/in/data/train*.parquet") == [0, 1, 1, 2]
    with pytest.raises(DataError, match=r"in/train-\*\.parquet has no \.parquet file"):  # `*` crosses no folder
        rows("in/train-*.parquet")
    with pytest.raises(UsageError, match=r"has no split 'validation': give one of train, test, all"):
        rows("in", "validation")
    shutil.copy(tmp_path / "in/data/test-00000-of-2.parquet", tmp_path / "in/data/more.parquet")
    with pytest.raises(UsageError, match=r"holds train, test and more: name a split with --split"):
        rows("in")


def test_other_stores_go_through_fsspec(tmp_path: Path) -> None:
    images = some_images(12)
    path = write_parquet(tmp_path / "x.parquet", images, LABELS, NAMES)
    store = fsspec.filesystem("memory")
    for name in ("train-0", "train-1"):
        store.pipe(f"/bucket/set/{name}.parquet", path.read_bytes())
    ingest("memory://bucket/set/train-*.parquet", tmp_path / "out")
    assert_holds(tmp_path / "out", np.concatenate([images, images]), LABELS * 2)
    assert ingest("memory://bucket/set", tmp_path / "folder").source == "memory://bucket/set (split train)"
    first, second = find_files("memory://bucket/set", ".parquet")
    assert (first.name, second.name, first.is_local) == ("train-0.parquet", "train-1.parquet", False)
    with pytest.raises(DataError, match=r"memory://bucket/nothing does not exist"):
        ingest("memory://bucket/nothing", tmp_path / "none")


def test_credentials_of_a_uri_are_not_kept() -> None:
    uri = "s3://KEY:SECRET@bucket/a/*.parquet?region=eu&secret=x"
    assert without_credentials(uri) == "s3://bucket/a/*.parquet"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    source = f"s3://KEY:SECRET@bucket/a?scheme=http&endpoint_override=127.0.0.1:{port}"
    with pytest.raises(DataError, match=r"^s3://bucket/a cannot be listed") as error:  # nobody listens there
        find_files(source, ".parquet")
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [0, None]}, r"row 1 has no label: add it, or give --label-column none"),
        ({"label": [0, -1]}, r"row 1: label -1, expected 0\.\.2"),
        ({"label": [0, 3]}, r"row 1: label 3, expected 0\.\.2"),
    ],
)
def test_labels_that_are_none_are_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    table = binary_table(some_images(2), **columns)
    features = {"label": {"_type": "ClassLabel", "names": list(NAMES)}}
    pq.write_table(table.replace_schema_metadata(hugging_face(features)), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=message):
        ingest(str(tmp_path / "x.parquet"), tmp_path / "out")
    assert not ingest(str(tmp_path / "x.parquet"), tmp_path / "out", label_column="none").has_labels


def test_images_outside_the_file_are_refused(tmp_path: Path) -> None:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    for value in ({"bytes": None, "path": "/home/me/1.png"}, None):
        pq.write_table(pa.table({"image": pa.array([value], type=kind)}), tmp_path / "x.parquet")
        with pytest.raises(DataError, match="row 0 has no image bytes"):
            ingest(str(tmp_path / "x.parquet"), tmp_path / "out")


def test_files_of_other_schemas_are_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "a.parquet", some_images(2), [0, 1], NAMES)
    write_parquet(tmp_path / "in" / "b.parquet", some_images(2), [0, 1], NAMES, image="picture")
    with pytest.raises(DataError, match=r"b\.parquet has no column 'image', which the first file has"):
        ingest(str(tmp_path / "in"), tmp_path / "out")
    pq.write_table(pa.table({"x": [1.0]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="has no column of images, its columns are x"):
        ingest(str(tmp_path / "c.parquet"), tmp_path / "out")


def test_no_rows_are_no_dataset(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "x.parquet", some_images(0), [], NAMES)
    with pytest.raises(DataError, match=r"x\.parquet has no images, expected one at least"):
        ingest(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(10)
def test_damaged_parquet_never_crashes_and_is_named(tmp_path: Path) -> None:
    """Without page checksums, as such files come: what is noticed is named; the PNGs inside notice the rest."""
    images = some_images(30, (12, 12, 3))
    source = write_parquet(tmp_path / "x.parquet", images, [0] * 30, NAMES)
    sound, chance = source.read_bytes(), random.Random(0)
    for length in (0, 4, len(sound) // 2, len(sound) - 1):
        source.write_bytes(sound[:length])
        with pytest.raises(DataError, match=r"x\.parquet is not a readable Parquet file"):
            ingest(str(source), tmp_path / "out")
    changed = 0
    for trial in range(100):
        data = bytearray(sound)
        for _ in range(chance.choice([1, 3])):
            low = chance.choice([0, len(data) - 800])
            data[chance.randrange(low, len(data))] ^= 1 << chance.randrange(8)
        source.write_bytes(data)
        try:
            ingest(str(source), tmp_path / f"out-{trial}")
            dataset = Dataset.open(tmp_path / f"out-{trial}")
            whole = len(dataset) == 30 and np.array_equal(dataset.read(range(30)), chw(images))
            changed += not whole
        except PipelineError as error:
            message = str(error)
            assert "x.parquet" in message
            assert "\n" not in message
    assert changed == 0


class Canary:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "name", ["ray.data.arrow_tensor", "ray.data.arrow_variable_shaped_tensor", "arrow.py_extension_type"]
)
def test_extension_types_that_run_code_are_refused(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    code = pickle.dumps(Canary(canary))
    pickle.loads(code)  # noqa: S301
    assert canary.exists()  # it would sing
    canary.unlink()
    field = pa.field(
        "x",
        pa.binary(),
        metadata={"ARROW:extension:name": name, "ARROW:extension:metadata": code.decode("latin-1").encode()},
    )
    table = pa.table([pa.array([png_of(some_images(1)[0])])], schema=pa.schema([field]))
    source = tmp_path / "x.parquet"
    pq.write_table(table, source)
    assert b"ARROW:schema" in source.read_bytes()
    # where Ray Data is loaded, its own types refuse what is not theirs before we come to see the footer
    with pytest.raises(DataError, match=r"has extension types that could run code|is not a readable Parquet file"):
        ingest(str(source), tmp_path / "out")
    assert not canary.exists()


def test_nothing_is_read_where_parquet_could_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_parquet(tmp_path / "x.parquet", some_images(2), [0, 1], NAMES)
    monkeypatch.setenv("RAY_DATA_ARROW_EXTENSION_SERIALIZATION_CLOUDPICKLE", "1")
    with pytest.raises(UsageError, match="unset it"):
        ingest(str(source), tmp_path / "out")


# -- torchvision's sets ---------------------------------------------------------------------------------------------------


def idx(array: Pixels) -> bytes:
    """LeCun's format: zero, type 8 (unsigned byte), number of dimensions, the dimensions, the bytes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(raw: Path, images: Pixels, labels: Pixels, part: str = "train", pack: bool = True) -> None:
    raw.mkdir(parents=True, exist_ok=True)
    for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
        if pack:
            (raw / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (raw / name).write_bytes(idx(array))


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
@pytest.mark.parametrize("pack", [True, False], ids=["gz", "unpacked"])
def test_mnist_and_fashion_mnist(tmp_path: Path, name: str, folder: str, pack: bool) -> None:
    images, labels = some_images(20, (28, 28, 1)), (np.arange(20) % 10).astype(np.uint8)
    downloads = tmp_path / "downloads"
    write_mnist(downloads / folder / "raw", images[:15, :, :, 0], labels[:15], "train", pack)
    write_mnist(downloads / folder / "raw", images[15:, :, :, 0], labels[15:], "t10k", pack)
    for split, part in ((None, slice(0, 15)), ("test", slice(15, 20)), ("all", slice(0, 20))):
        manifest = ingest(name, tmp_path / f"out-{split}", split=split, downloads=downloads, offline=True)
        assert manifest.class_names == SETS[name].class_names
        assert_holds(tmp_path / f"out-{split}", images[part], labels[part])
    with pytest.raises(UsageError, match=f"{name} has no split 'validation': give one of train, test, all"):
        ingest(name, tmp_path / "out", split="validation", downloads=downloads)


def test_the_files_are_read_as_torchvision_reads_them(tmp_path: Path) -> None:
    from torchvision.datasets import FashionMNIST

    images, labels = some_images(7, (28, 28, 1)), np.arange(7, dtype=np.uint8)
    for part in ("train", "t10k"):
        write_mnist(tmp_path / "FashionMNIST" / "raw", images[:, :, :, 0], labels, part, pack=False)
    ingest("fashion-mnist", tmp_path / "out", downloads=tmp_path, offline=True)
    theirs = FashionMNIST(str(tmp_path), train=True, download=False)
    dataset = Dataset.open(tmp_path / "out")
    np.testing.assert_array_equal(dataset.read(range(7))[:, 0], theirs.data.numpy())
    np.testing.assert_array_equal(dataset.labels(), theirs.targets.numpy())
    assert dataset.manifest.class_names == tuple(theirs.classes)


def write_cifar(path: Path, images: Pixels, labels: Pixels) -> None:
    """The binary version: records of a label byte and 3x32x32 pixels, five training files and a test file in a tar."""
    records = np.concatenate([labels[:, None], chw(images).reshape(len(images), -1)], axis=1)
    with tarfile.open(path, "w:gz") as archive:
        for i, name in enumerate([*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]):
            data = records[2 * i : 2 * i + 2].tobytes()
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_cifar10(tmp_path: Path) -> None:
    images, labels = some_images(12, (32, 32, 3)), (np.arange(12) % 10).astype(np.uint8)
    write_cifar(tmp_path / "cifar-10-binary.tar.gz", images, labels)
    for split, part in (("train", slice(0, 10)), ("test", slice(10, 12)), ("all", slice(0, 12))):
        manifest = ingest("cifar10", tmp_path / f"out-{split}", split=split, downloads=tmp_path, offline=True)
        assert_holds(tmp_path / f"out-{split}", images[part], labels[part])
    assert manifest.class_names is not None
    assert (manifest.class_names[0], manifest.class_names[9]) == ("airplane", "truck")


@pytest.mark.fault(10)
def test_damaged_sets_are_named(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    images, labels = some_images(5, (28, 28, 1))[..., 0], np.arange(5, dtype=np.uint8)
    write_mnist(raw, images, labels)
    sound = (raw / "train-images-idx3-ubyte.gz").read_bytes()
    bad = {
        "cut": sound[:-9],
        "flipped": sound[:-20] + bytes([sound[-20] ^ 1]) + sound[-19:],
        "longer": gzip.compress(idx(images) + b"x"),
        "floats": gzip.compress(struct.pack(">HBBI", 0, 0x0D, 1, 1) + bytes(4)),
        "fewer": gzip.compress(idx(images[1:])),
        "no idx": b"<html>",
        "empty": b"",
    }
    for data in bad.values():
        (raw / "train-images-idx3-ubyte.gz").write_bytes(data)
        with pytest.raises(DataError, match=r"MNIST/raw holds a damaged file \(.*\): delete it to download it again"):
            ingest("mnist", tmp_path / "out", downloads=tmp_path, offline=True)
    write_mnist(raw, images, labels + 6)
    with pytest.raises(DataError, match=r"mnist train, row 4: label 10, expected 0\.\.9"):
        ingest("mnist", tmp_path / "out", downloads=tmp_path, offline=True)
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(sound)
    with pytest.raises(DataError, match="holds a damaged file"):
        ingest("cifar10", tmp_path / "out", downloads=tmp_path, offline=True)


# -- downloads ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """An HTTP server on loopback with one file."""
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "set.gz").write_bytes(b"published" * 1000)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path / "www"))

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def published(url: str, data: bytes = b"published" * 1000) -> Archive:
    return Archive(url, "MNIST/raw/set.gz", len(data), hashlib.sha256(data).hexdigest())


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_file_is_downloaded_once_and_checked(server: str, tmp_path: Path) -> None:
    said: list[str] = []
    archive, downloads = published(f"{server}/set.gz"), tmp_path / "downloads"
    path = fetch(archive, downloads, False, said.append)
    assert path.read_bytes() == b"published" * 1000
    assert said == [f"downloading {server}/set.gz (0.0 MB)"]
    (tmp_path / "www" / "set.gz").unlink()
    assert fetch(archive, downloads, False, said.append) == path
    assert fetch(archive, downloads, True, said.append) == path
    assert len(said) == 1
    assert files_below(downloads) == [path]


@pytest.mark.parametrize(
    "sent", [b"publishes" * 1000, b"published" * 999, b"published" * 100_000], ids=["other", "less", "more"]
)
def test_another_file_than_was_published_is_not_kept(server: str, tmp_path: Path, sent: bytes) -> None:
    (tmp_path / "www" / "set.gz").write_bytes(sent)
    with pytest.raises(DataError, match=r"sent another file than was published .*put the file from"):
        fetch(published(f"{server}/set.gz"), tmp_path / "downloads", False, lambda _: None)
    assert not (tmp_path / "downloads").exists()


def test_downloads_that_fail_say_why_and_what_to_do(server: str, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}/set.gz"
    for url, reason in ((f"{server}/nothing.gz", "not found"), (nobody, "refused")):
        with pytest.raises(
            DataError, match=rf"cannot be downloaded \(.*{reason}.*\): check the network, or put the file"
        ):
            fetch(published(url), tmp_path / "downloads", False, lambda _: None)
    with pytest.raises(
        DataError, match=r"MNIST/raw/set\.gz is not in .* and downloads are off: allow them, or put the"
    ):
        fetch(published(f"{server}/set.gz"), tmp_path / "downloads", True, lambda _: None)
    assert not (tmp_path / "downloads").exists()


def test_a_set_that_is_not_here_needs_the_network(tmp_path: Path) -> None:
    for name in SETS:
        with pytest.raises(DataError, match="downloads are off"):
            ingest(name, tmp_path / "out", downloads=tmp_path / "downloads", offline=True)
    assert list(tmp_path.iterdir()) == []


def test_the_published_files_are_described_alike(tmp_path: Path) -> None:
    for known in SETS.values():
        assert len(known.class_names) == 10
        for archive in (archive for archives in known.archives.values() for archive in archives):
            assert archive.url.startswith("https://")
            assert archive.url.endswith(Path(archive.file).name)
            assert len(bytes.fromhex(archive.sha256)) == 32


def test_manifests_say_where_images_came_from(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "flowers" / "train-0.parquet", some_images(2), [0, 1], NAMES)
    ingest(str(source.parent), tmp_path / "out", split="train")
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.name, manifest.source) == ("flowers", f"{tmp_path}/flowers (split train)")


@pytest.mark.parametrize("ingested", [True, False])
def test_a_folder_called_like_a_built_in_set_does_not_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ingested: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(Path("images"), some_images(4))
    if ingested:
        ingest("images", Path("digits"))
    else:
        shutil.move("images", "digits")
    assert ensure_ingested(DataConfig(), tmp_path / "datasets").manifest.num_rows == 1797
    assert availability(DataConfig(), tmp_path / "datasets").num_rows == 1797
    assert ensure_ingested(DataConfig(source="./digits"), tmp_path / "datasets").manifest.num_rows == 4
    assert absolute_source("digits") == "digits"
    assert absolute_source("./digits") == str(tmp_path / "digits")
    asked = train_request(Context(Profile()), None, "digits", "digits", ())
    assert asked.experiment.data.source == "digits"
