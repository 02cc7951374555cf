"""Datasets on disk: what is read is what was written, and nothing that was changed since is read in silence."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.manifest import Manifest
from pipeline.data.shards import Dataset
from pipeline.errors import DataError, UsageError
from tests.kit.data import Pixels, dataset_of, some_images

LABELS = np.arange(150) % 7


def tiled_images() -> Pixels:
    """Images that compress well, so that their shard is compressed."""
    return np.repeat(np.repeat(some_images(150, (5, 5, 3)), 6, axis=1), 6, axis=2)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """150 random images 48x48x3 in two shards of one row group each, uncompressed for they do not shrink."""
    images = some_images(150, (48, 48, 3))
    return dataset_of(tmp_path_factory.mktemp("raw") / "data", images, LABELS, rows_per_shard=128)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return dataset_of(tmp_path_factory.mktemp("zstd") / "data", tiled_images(), LABELS)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Images above 64x64, kept as PNG, without labels."""
    return dataset_of(tmp_path_factory.mktemp("png") / "data", some_images(40, (66, 30, 1)))


def copy_of(dataset: Dataset, folder: Path) -> Path:
    shutil.copytree(dataset.folder, folder)
    return folder


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    replace(Manifest.load(folder), **changes).save(folder)


def chw(images: Pixels) -> Pixels:
    return images.transpose(0, 3, 1, 2)


def test_what_is_read_is_what_was_written(raw: Dataset, compressed: Dataset, large: Dataset) -> None:
    assert [len(s.row_group_rows) for s in raw.manifest.shards] == [1, 1]
    assert (raw.manifest.encoding, large.manifest.encoding) == ("raw", "png")
    stored = [pq.read_metadata(d.folder / "shard-00000.parquet").row_group(0).column(0) for d in (raw, compressed)]
    assert [column.compression for column in stored] == ["UNCOMPRESSED", "ZSTD"]
    originals = (some_images(150, (48, 48, 3)), tiled_images(), some_images(40, (66, 30, 1)))
    for dataset, images in zip((raw, compressed, large), originals, strict=True):
        rows = np.random.default_rng(1).integers(0, len(dataset), 70)  # any order, some twice
        held = Dataset.open(dataset.folder)
        held.hold_in_memory()
        for reader in (dataset, held):
            np.testing.assert_array_equal(reader.read(rows), chw(images)[rows])
            np.testing.assert_array_equal(reader.read(range(len(dataset))), chw(images))
            assert reader.read([]).shape == (0, *dataset.manifest.shape)
        dataset.verify()
    for reader in (raw, Dataset.open(raw.folder)):
        np.testing.assert_array_equal(reader.labels(), LABELS)
        np.testing.assert_array_equal(reader.labels([149, 3, 3]), LABELS[[149, 3, 3]])
    assert large.labels() is None
    assert not large.in_memory


def test_rows_outside_the_dataset_are_refused(raw: Dataset) -> None:
    for rows in ([150], [-1], [0, 10**12]):
        with pytest.raises(IndexError, match=r"outside 0\.\.149"):
            raw.read(rows)
        with pytest.raises(IndexError, match=r"outside 0\.\.149"):
            raw.labels(rows)


@pytest.mark.fault(8)
@pytest.mark.parametrize("cut", [1, 1000, None, "all", "gone"])
def test_a_truncated_shard_is_named_when_the_dataset_is_opened(raw: Dataset, tmp_path: Path, cut: Any) -> None:
    shard = copy_of(raw, tmp_path / "d") / "shard-00001.parquet"
    data = shard.read_bytes()
    kept = {None: len(data) // 2, "all": 0, "gone": 0}.get(cut, len(data) - cut if isinstance(cut, int) else 0)
    shard.write_bytes(data[:kept])
    if cut == "gone":
        shard.unlink()
    with pytest.raises(DataError, match=r"shard-00001\.parquet is missing or damaged \(.*restore it or ingest"):
        Dataset.open(tmp_path / "d")


@pytest.mark.fault(9)
@pytest.mark.promise("P3")
@pytest.mark.parametrize("held", [False, True], ids=["disk", "memory"])
@pytest.mark.parametrize("kind", ["raw", "compressed", "large"])
def test_no_flipped_bit_goes_unnoticed(kind: str, held: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """One to three flipped bits anywhere in a shard, 60 times: an error, or the very same rows."""
    dataset: Dataset = request.getfixturevalue(kind)
    images, labels = dataset.read(range(len(dataset))), dataset.labels()
    folder = copy_of(dataset, tmp_path / "d")
    shard = folder / "shard-00000.parquet"
    sound = shard.read_bytes()
    chance, messages, silent = random.Random(f"{kind} {held}"), list[str](), list[int]()
    for trial in range(60):
        data = bytearray(sound)
        for _ in range(chance.randint(1, 3)):
            # Half of them where structure is (page headers, footer), which is small and would hardly be hit.
            low = chance.choice([0, len(data) - 700])
            data[chance.randrange(low, len(data))] ^= 1 << chance.randrange(8)
        shard.write_bytes(data)
        try:
            damaged = Dataset.open(folder)
            if held:
                damaged.hold_in_memory()
            same = np.array_equal(damaged.read(range(len(dataset))), images)
            found = damaged.labels()
            if not same or (labels is not None and not np.array_equal(found, labels)):  # type: ignore[arg-type]
                silent.append(trial)
        except DataError as error:
            messages.append(str(error))
        with pytest.raises(DataError):
            Dataset.open(folder).verify()
    assert silent == []
    assert len(messages) >= (
        60 if held else 45
    )  # from disk a bit may lie in what is never used, such as the writer's name
    assert all(str(shard) in message and "\n" not in message for message in messages)


@pytest.mark.fault(9)
def test_no_single_bit_of_the_structure_goes_unnoticed(tmp_path: Path) -> None:
    """Every bit of a page header and of the footer, one after another: what chance would hardly hit."""
    dataset = dataset_of(tmp_path / "d", some_images(40, (20, 20, 3)), np.arange(40))
    images, labels = dataset.read(range(40)), dataset.labels()
    shard = dataset.folder / "shard-00000.parquet"
    sound, outcomes = shard.read_bytes(), {"noticed": 0, "same": 0, "silent": 0}
    for position in [*range(44), *range(len(sound) - 350, len(sound))]:
        for bit in range(8):
            data = bytearray(sound)
            data[position] ^= 1 << bit
            shard.write_bytes(data)
            try:
                damaged = Dataset.open(dataset.folder)
                same = np.array_equal(damaged.read(range(40)), images) and np.array_equal(damaged.labels(), labels)  # type: ignore[arg-type]
                outcomes["same" if same else "silent"] += 1
            except DataError:
                outcomes["noticed"] += 1
    assert outcomes["silent"] == 0
    assert outcomes["noticed"] > outcomes["same"]


@pytest.mark.fault(9)
@pytest.mark.promise("P3")
def test_damage_is_placed(raw: Dataset, tmp_path: Path) -> None:
    shard = copy_of(raw, tmp_path / "d") / "shard-00001.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    damaged = Dataset.open(tmp_path / "d")
    np.testing.assert_array_equal(damaged.read([0, 127]), raw.read([0, 127]))  # the other shard is sound
    with pytest.raises(DataError, match=r"shard-00001\.parquet, row group 0 is damaged .*CRC.*restore the file"):
        damaged.read([0, 130])
    with pytest.raises(DataError, match=r"shard-00001\.parquet is damaged \(its sha256 differs"):
        damaged.hold_in_memory()
    assert raw.locate(130) == f"{raw.folder}/shard-00001.parquet, row group 0, row 130"


def forged_shard(folder: Path, write: Callable[[Any, Path], None]) -> None:
    """Write the first shard again in another way, with a manifest that agrees with its size and sha256."""
    path = folder / "shard-00000.parquet"
    write(pq.read_table(path), path)
    data = path.read_bytes()
    manifest = Manifest.load(folder)
    shard = replace(manifest.shards[0], num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    rewrite_manifest(folder, shards=(shard, *manifest.shards[1:]))


def plain(table: Any, path: Path, **options: Any) -> None:
    pq.write_table(
        table, path, **{"store_schema": False, "row_group_size": 128, "write_page_checksum": True, **options}
    )


FORGERIES: dict[str, tuple[Callable[[Any, Path], None], str]] = {
    "a schema with extension types could be in it": (lambda t, p: plain(t, p, store_schema=True), "it has metadata"),
    "labels that may be missing": (
        lambda t, p: plain(t.cast(pa.schema([t.schema.field(0), pa.field("label", pa.int64())])), p),
        "its columns are",
    ),
    "labels as floats": (
        lambda t, p: plain(
            t.set_column(1, pa.field("label", pa.float64(), nullable=False), t["label"].cast("double")), p
        ),
        "its columns are",
    ),
    "another column": (lambda t, p: plain(t.append_column("extra", t["label"]), p), "its columns are"),
    "columns in another order": (lambda t, p: plain(t.select(["label", "image"]), p), "its columns are"),
    "images of another size": (
        lambda t, p: plain(
            t.set_column(
                0,
                pa.field("image", pa.binary(6911), nullable=False),
                pa.array([v[:-1] for v in t["image"].to_pylist()], pa.binary(6911)),
            ),
            p,
        ),
        "its columns are",
    ),
    "fewer rows": (lambda t, p: plain(t.slice(1), p), "its row groups have 127 rows, the manifest says 128"),
    "other row groups": (lambda t, p: plain(t, p, row_group_size=64), "its row groups have 128 rows"),
}


@pytest.mark.fault(9)
@pytest.mark.parametrize("kind", FORGERIES)
def test_only_our_own_layout_is_opened(raw: Dataset, tmp_path: Path, kind: str) -> None:
    folder = copy_of(raw, tmp_path / "d")
    write, message = FORGERIES[kind]
    forged_shard(folder, write)
    with pytest.raises(DataError, match=message):
        Dataset.open(folder)


def test_a_shard_of_other_content_fails_verification(raw: Dataset, tmp_path: Path) -> None:
    """Well-formed, with the right checksums, and yet not what was ingested: the fingerprint tells."""
    folder = copy_of(raw, tmp_path / "d")
    forged_shard(folder, lambda t, p: plain(t.take(list(range(127, -1, -1))), p))
    with pytest.raises(DataError, match="the content's fingerprint is"):
        Dataset.open(folder).verify()


def test_the_fingerprint_is_its_definition(raw: Dataset) -> None:
    images, labels = some_images(150, (48, 48, 3)), LABELS
    rows = b"".join(hashlib.sha256(image.tobytes()).digest() for image in np.ascontiguousarray(chw(images)))
    content = {
        "class_names": None,
        "labels": hashlib.sha256(b"".join(int(v).to_bytes(8, "little") for v in labels)).hexdigest(),
        "num_rows": 150,
        "pixels": hashlib.sha256(rows).hexdigest(),
        "shape": [3, 48, 48],
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert raw.manifest.fingerprint == hashlib.sha256(text.encode()).hexdigest()


def test_the_statistics_are_those_of_the_pixels(raw: Dataset, large: Dataset) -> None:
    for dataset in (raw, large):
        scaled = dataset.read(range(len(dataset))).astype(np.float64) / 127.5 - 1
        np.testing.assert_allclose(dataset.manifest.mean, scaled.mean(axis=(0, 2, 3)), rtol=0, atol=1e-12)
        np.testing.assert_allclose(dataset.manifest.std, scaled.std(axis=(0, 2, 3)), rtol=0, atol=1e-12)


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=2), "has dataset format 2, this release reads up to 1: update"),
        (lambda c: c.update(format="1"), "is not a dataset manifest"),
        (lambda c: c.update(fingerprint="0" * 64), "was changed after it was written"),
        (lambda c: c["mean"].reverse() or c["mean"].append(0.5), "was changed after it was written"),
        (lambda c: c.pop("checksum"), "was changed after it was written"),
    ],
)
def test_a_changed_manifest_is_refused(raw: Dataset, tmp_path: Path, change: Any, message: str) -> None:
    edit(copy_of(raw, tmp_path / "d"), change)
    with pytest.raises(DataError, match=message):
        Dataset.open(tmp_path / "d")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "\x00\xff"])
def test_a_manifest_that_is_none_is_refused(raw: Dataset, tmp_path: Path, text: str) -> None:
    (copy_of(raw, tmp_path / "d") / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json .*ingest the dataset again"):
        Dataset.open(tmp_path / "d")


@pytest.mark.parametrize("name", ["../secret.parquet", "/etc/passwd", "shard-1.parquet", "shard-00000.parquet/.."])
def test_a_manifest_cannot_name_files_elsewhere(raw: Dataset, tmp_path: Path, name: str) -> None:
    folder = copy_of(raw, tmp_path / "d")
    rewrite_manifest(folder, shards=(replace(raw.manifest.shards[0], file=name), raw.manifest.shards[1]))
    with pytest.raises(DataError, match=r"not a dataset manifest \(shards\.0\.file is wrong\): ingest"):
        Dataset.open(folder)


def test_what_is_no_dataset_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere is not a folder: give one that `ddpm-pipe ingest"):
        Dataset.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"is not an ingested dataset \(no manifest\.json\): make one with"):
        Dataset.open(tmp_path)


def test_nothing_is_opened_where_parquet_could_run_code(raw: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = "RAY_DATA_ARROW_EXTENSION_SERIALIZATION_CLOUDPICKLE"
    monkeypatch.setenv(setting, "1")
    with pytest.raises(UsageError, match=f"{setting} is set, .* unset it"):
        Dataset.open(raw.folder)
    monkeypatch.setenv(setting, "0")
    Dataset.open(raw.folder)
