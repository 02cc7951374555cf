"""Ingest as a whole: the same dataset however it is made, complete or not at all, and the cache in front of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_sample_images

from pipeline.config.experiment import DataConfig
from pipeline.data.images import decode_image
from pipeline.data.shards import Dataset
from pipeline.errors import DataError, StorageError, UsageError
from pipeline.ingest.ingest import availability, dataset_folder, ensure_ingested, ingest
from pipeline.ingest.resolve import resolve_source
from pipeline.ingest.rows import encode_png
from tests.kit.data import (
    Pixels,
    jpeg_of,
    png_of,
    some_images,
    write_folder,
    write_npz,
    write_parquet,
)
from tests.kit.small_disk import small_disk
from tests.kit.waiting import wait_for

NAMES = ("ant", "bee", "cat")
LABELS = [0] * 4 + [1] * 5 + [2] * 3


def everything_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# -- the same content, the same dataset -----------------------------------------------------------------------------------


def test_equal_content_gives_an_equal_fingerprint_whatever_it_comes_from(tmp_path: Path) -> None:
    images = some_images(12)
    folder = write_folder(tmp_path / "folder", images, LABELS, NAMES)
    parquet = write_parquet(tmp_path / "p" / "data.parquet", images, LABELS, NAMES)
    a = ingest(str(folder), tmp_path / "a")
    b = ingest(str(parquet), tmp_path / "b", rows_per_shard=1)
    c = ingest(str(folder), tmp_path / "c", num_workers=2)
    assert a.class_names == b.class_names == NAMES
    assert a.fingerprint == b.fingerprint == c.fingerprint
    assert (a.mean, a.std) == (b.mean, b.std) == (c.mean, c.std)
    assert [shard.sha256 for shard in a.shards] == [shard.sha256 for shard in c.shards]
    np.testing.assert_array_equal(Dataset.open(tmp_path / "a").read(range(12)), images.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(Dataset.open(tmp_path / "a").labels(), LABELS)


def test_photographs_and_drawings_are_stored_exactly_and_small() -> None:
    photograph = load_sample_images().images[0][:256, :256]
    drawing = np.full((256, 256, 3), 255, dtype=np.uint8)
    drawing[40:90, 30:200] = (200, 30, 30)
    for pixels, bytes_at_most in ((photograph, 150_000), (drawing, 4_000), (drawing[:, :, :1], 2_000)):
        data = encode_png(pixels)
        np.testing.assert_array_equal(decode_image(data), pixels)
        assert len(data) <= bytes_at_most


@pytest.mark.parametrize("changed", ["a pixel", "a label", "a class name", "the order", "no labels"])
def test_other_content_gives_another_fingerprint(tmp_path: Path, changed: str) -> None:
    images, labels, names = some_images(12), list(LABELS), NAMES
    original = ingest(str(write_parquet(tmp_path / "x.parquet", images, labels, names)), tmp_path / "x")
    if changed == "a pixel":
        images[7, 0, 0, 0] ^= 1
    elif changed == "a label":
        labels[3] = 1
    elif changed == "a class name":
        names = ("ant", "bee", "dog")
    elif changed == "the order":
        images[[0, 1]] = images[[1, 0]]
    other = ingest(
        str(write_parquet(tmp_path / "y.parquet", images, labels, names)),
        tmp_path / "y",
        label_column="none" if changed == "no labels" else None,
    )
    assert original.fingerprint != other.fingerprint


@pytest.mark.slow
def test_processes_and_shards_change_nothing_of_the_content(tmp_path: Path) -> None:
    """Three chunks for the pool: of JPEGs, and made larger, so that decoding, resizing and PNG are in it."""
    root = tmp_path / "photos"
    root.mkdir()
    for row, image in enumerate(some_images(700, (8, 8, 3))):
        (root / f"{row:04d}.jpg").write_bytes(jpeg_of(image))
    alone = ingest(str(root), tmp_path / "alone", image_size=(72, 70))
    pool = ingest(str(root), tmp_path / "pool", image_size=(72, 70), num_workers=2, rows_per_shard=100)
    assert (alone.encoding, alone.shape) == ("png", (3, 72, 70))
    assert len(pool.shards) > len(alone.shards)
    assert (pool.fingerprint, pool.mean, pool.std) == (alone.fingerprint, alone.mean, alone.std)
    Dataset.open(tmp_path / "pool").verify()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["an unguarded script", "standard input"])
def test_the_pool_does_not_need_the_main_module(tmp_path: Path, how: str) -> None:
    folder = write_folder(tmp_path / "in", some_images(600, (4, 4, 1)))
    code = f"""
from pathlib import Path
from pipeline.ingest.ingest import ingest
print(ingest({str(folder)!r}, Path({str(tmp_path / "out")!r}), num_workers=2).num_rows)
"""
    (tmp_path / "script.py").write_text(code)
    command = [sys.executable, str(tmp_path / "script.py") if how == "an unguarded script" else "-"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.run(command, input=code, capture_output=True, text=True, check=False, env=environment)
    assert (process.stdout, process.stderr) == ("600\n", "")


def test_digits_are_those_of_scikit_learn(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    manifest = ingest("digits", tmp_path / "d")
    dataset, known = Dataset.open(tmp_path / "d"), load_digits()
    levels = np.rint(dataset.read(range(1797))[:, 0] * (16 / 255))
    np.testing.assert_array_equal(levels, known.images)
    np.testing.assert_array_equal(dataset.labels(), known.target)
    assert (manifest.shape, manifest.class_names) == ((1, 8, 8), tuple("0123456789"))
    assert {int(v) for v in np.unique(dataset.read(range(1797)))} == {round(255 * v / 16) for v in range(17)}


def test_progress_and_choices_are_printed(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_parquet(tmp_path / "p" / f"{split}-0.parquet", some_images(12), LABELS, NAMES)
    seen: list[tuple[int, int | None]] = []
    said: list[str] = []
    ingest(str(tmp_path / "p"), tmp_path / "d", progress=lambda *done: seen.append(done), say=said.append)
    assert seen == [(12, 12)]
    assert said == [f"taking split 'train' of {tmp_path / 'p'} (also there: test)"]


# -- complete or not at all -----------------------------------------------------------------------------------------------


def test_nothing_is_left_of_an_ingest_that_fails(tmp_path: Path) -> None:
    images = some_images(600, (40, 40, 3))
    folder = write_folder(tmp_path / "in", images)
    (folder / "00599.png").write_bytes(png_of(images[599])[:-20])
    before = everything_below(tmp_path)
    for num_workers in (1, 2):
        with pytest.raises(DataError, match=r"00599\.png: a damaged PNG image"):
            ingest(str(folder), tmp_path / "new" / "parents" / "out", num_workers=num_workers)
        assert everything_below(tmp_path) == before


def test_nothing_is_left_after_ctrl_c_in_process(tmp_path: Path) -> None:
    source = write_npz(tmp_path / "x.npz", x=some_images(600))

    def stop(done: int, total: int | None) -> None:
        if done > 256:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(str(source), tmp_path / "out", progress=stop)
    assert everything_below(tmp_path) == {"x.npz"}


SLOW_INGEST = """
import sys, time
from pathlib import Path
from pipeline.ingest.ingest import ingest
def progress(done, total):
    print(done, flush=True)
    time.sleep(0.05)
if __name__ == "__main__":
    ingest(sys.argv[1], Path(sys.argv[2]), num_workers=int(sys.argv[3]), progress=progress)
"""


def start_slow_ingest(tmp_path: Path, source: Path, num_workers: int) -> subprocess.Popen[str]:
    script = tmp_path / "slow.py"
    script.write_text(SLOW_INGEST)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, str(script), str(source), str(tmp_path / "out"), str(num_workers)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, start_new_session=True
    )
    assert process.stdout is not None
    for _ in range(2):  # two chunks are done: it is in the midst of it
        assert process.stdout.readline().strip().isdigit()
    return process


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_ctrl_c_ends_all_processes_and_leaves_nothing(tmp_path: Path, num_workers: int) -> None:
    folder = write_folder(tmp_path / "in", some_images(6000, (8, 8, 3)))
    with start_slow_ingest(tmp_path, folder, num_workers) as process:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to the whole group
        assert process.wait(timeout=30) != 0
    wait_for(lambda: group_is_gone(process.pid), 10)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "slow.py"}


@pytest.mark.slow
def test_a_killed_ingest_leaves_no_process_and_the_next_one_takes_its_place(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", some_images(6000, (8, 8, 3)))
    with start_slow_ingest(tmp_path, folder, 2) as process:
        process.kill()
    wait_for(lambda: group_is_gone(process.pid), 10)
    assert not (tmp_path / "out").exists()
    ingest(str(folder), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "slow.py"}
    Dataset.open(tmp_path / "out").verify()


def test_one_process_writes_a_folder_at_a_time(tmp_path: Path) -> None:
    source = write_npz(tmp_path / "x.npz", x=some_images(6000, (8, 8, 3)))
    with start_slow_ingest(tmp_path, source, 1) as process:
        with pytest.raises(UsageError, match=r"another process is writing .*out: wait for it"):
            ingest(str(source), tmp_path / "out")
        process.kill()


@pytest.mark.fault(7)
def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", some_images(3))
    (tmp_path / "file").write_text("")
    before = everything_below(tmp_path)
    with pytest.raises(UsageError, match=r"in exists: give a new folder"):
        ingest("digits", folder)
    with pytest.raises(UsageError, match=r"file exists: give a new folder"):
        ingest("digits", tmp_path / "file")
    with pytest.raises(UsageError, match=r"in/deeper/out lies inside the source"):
        ingest(str(folder), folder / "deeper" / "out")
    with pytest.raises(StorageError, match=r"file/out cannot be written \(Not a directory\)"):
        ingest("digits", tmp_path / "file" / "out")
    with pytest.raises(StorageError, match="cannot be written"):
        ingest("digits", Path("/proc/out"))
    assert everything_below(tmp_path) == before


@pytest.mark.fault(6)
def test_a_full_disk_is_said_to_be_so(tmp_path: Path) -> None:
    source = write_npz(tmp_path / "x.npz", x=some_images(500))
    (tmp_path / "disk").mkdir()
    with small_disk(tmp_path / "disk", "size=32k") as disk:
        out = disk.inside / "out"
        with pytest.raises(StorageError) as told:
            ingest(str(source), out)
        assert (
            str(told.value) == f"{out} cannot be written (No space left on device): free space, or give another folder"
        )
        assert everything_below(disk.inside) == set()


# -- what cannot be ingested ----------------------------------------------------------------------------------------------


@pytest.mark.fault(12)
def test_mixed_shapes_are_named(tmp_path: Path) -> None:
    def folder(name: str, *images: Pixels) -> str:
        for row, image in enumerate(images):
            write_folder(tmp_path / name, image[None]).joinpath("00000.png").rename(tmp_path / name / f"row{row}.png")
        return str(tmp_path / name)

    square, tall, grey = some_images(1)[0], some_images(1, (7, 5, 3))[0], some_images(1, (6, 5, 1))[0]
    with pytest.raises(
        DataError, match=r"row2\.png is 7x5 with 3 channels, but .*row0\.png is 6x5 with 3 channels: .*--image-size"
    ):
        ingest(folder("a", square, square, tall), tmp_path / "out")
    with pytest.raises(
        DataError, match=r"row1\.png is 6x5 with 1 channel, but .*row0\.png is 6x5 with 3 channels: .*--mode"
    ):
        ingest(folder("b", square, grey), tmp_path / "out")
    assert ingest(str(tmp_path / "a"), tmp_path / "sized", image_size=4).shape == (3, 4, 4)
    assert ingest(str(tmp_path / "b"), tmp_path / "moded", mode="L").shape == (1, 6, 5)


@pytest.mark.fault(12)
def test_a_first_row_of_another_shape_is_named_by_the_pool_too(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", some_images(600))
    (folder / "00000.png").write_bytes(png_of(some_images(1, (3, 3, 3))[0]))
    with pytest.raises(DataError, match=r"00001\.png is 6x5 .* but .*00000\.png is 3x3"):
        ingest(str(folder), tmp_path / "out", num_workers=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "RGBA"}, r"mode: got 'RGBA', expected 'L' or 'RGB'"),
        ({"image_size": 0}, "image_size: got 0, expected at least 1"),
        ({"image_size": (20_000, 20_000)}, "image_size.*: got 20000, expected at most 8192"),
        ({"skip_damaged": -1}, "skip_damaged: got -1, expected at least 0"),
        ({"imagesize": 8}, r"unknown key 'imagesize' \(did you mean 'image_size'\?\)"),
        ({"split": "holdout"}, "digits has no split 'holdout': leave the split out"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ingest("digits", tmp_path / "d", **options)  # type: ignore[arg-type]
    assert everything_below(tmp_path) == set()


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("digit", DataError, r"digit does not exist: give .* \(did you mean 'digits'\?\)"),
        ("notes.txt", DataError, r"notes\.txt is not a source of images"),
        ("empty", DataError, r"empty has no images"),
        ("nowhere.parquet", DataError, r"nowhere\.parquet does not exist"),
        ("*.parquet", DataError, r"has no \.parquet file"),
        ("unknown://bucket/x", DataError, r"unknown://bucket/x cannot be listed"),
    ],
)
def test_what_is_no_source_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: type[Exception], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("Dear diary")
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=message):
        ingest(name, tmp_path / "out")


def test_a_folder_of_both_kinds_is_ambiguous(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", some_images(3))
    write_parquet(folder / "train.parquet", some_images(3), [0, 1, 2], NAMES)
    with pytest.raises(
        DataError, match="in has both Parquet files and image files: give a folder, or a glob, of one kind"
    ):
        ingest(str(folder), tmp_path / "out")
    assert ingest(str(folder / "*.parquet"), tmp_path / "out").num_rows == 3


def test_a_dataset_is_not_ingested_again(tmp_path: Path) -> None:
    ingest("digits", tmp_path / "d")
    with pytest.raises(UsageError, match="is already an ingested dataset"):
        ingest(str(tmp_path / "d"), tmp_path / "e")


# -- the cache ------------------------------------------------------------------------------------------------------------


def test_a_source_is_ingested_once_and_again_when_it_changes(tmp_path: Path) -> None:
    images, said = some_images(12), list[str]()
    source = write_folder(tmp_path / "pets", images, LABELS, NAMES)
    before = availability(DataConfig(source=str(source)), tmp_path / "cache")
    first = ensure_ingested(DataConfig(source=str(source)), tmp_path / "cache", said.append)
    assert (before.state, before.shape) == ("here", first.manifest.shape)
    again = ensure_ingested(DataConfig(source=str(source)), tmp_path / "cache", said.append)
    assert said == [f"ingesting {source} into {first.folder}, once", "classes: 3 (ant 4, bee 5, cat 3)"]
    assert again.folder == first.folder
    assert first.folder.parent == tmp_path / "cache"
    assert first.folder.name.startswith("pets-")
    state = availability(DataConfig(source=str(source)), tmp_path / "cache")
    assert (state.state, state.num_rows, state.shape) == ("cached", len(images), first.manifest.shape)

    moved = source.rename(tmp_path / "moved")  # the key is of the content, not of the place
    assert first.folder.name == f"pets-{key_of(str(moved))}"
    stat = (moved / "ant" / "00000.png").stat()
    changed = images[0].copy()
    changed[0, 0, 0] ^= 1
    (moved / "ant" / "00000.png").write_bytes(png_of(changed))
    os.utime(moved / "ant" / "00000.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # times tell nothing
    assert first.folder.name != f"pets-{key_of(str(moved))}"
    other = ensure_ingested(DataConfig(source=str(moved)), tmp_path / "cache", said.append)
    assert other.manifest.fingerprint != first.manifest.fingerprint


def key_of(source: str, **settings: Any) -> str:
    """The key that ends the name of a source's cached dataset."""
    data = DataConfig(source=source, **settings)
    folder = dataset_folder(resolve_source(data), data, Path("cache"))
    return str(folder).rpartition("-")[2]


def test_options_are_part_of_the_key(tmp_path: Path) -> None:
    source = str(write_npz(tmp_path / "x.npz", x=some_images(5), y=np.arange(5)))
    settings: list[dict[str, Any]] = [
        {},
        {"mode": "L"},
        {"image_size": 4},
        {"image_size": (4, 5)},
        {"label_column": "none"},
    ]
    assert len({key_of(source, **each) for each in settings}) == 5
    assert key_of(source, image_size=4) == key_of(source, image_size=(4, 4))
    every = [DataConfig(source=source, **each) for each in settings]
    shapes = [ensure_ingested(data, tmp_path / "cache").manifest.shape for data in every]
    assert shapes == [(3, 6, 5), (1, 6, 5), (3, 4, 4), (3, 4, 5), (3, 6, 5)]


def test_a_dataset_is_used_as_it_is(tmp_path: Path) -> None:
    manifest = ingest("digits", tmp_path / "d")
    assert ensure_ingested(DataConfig(source=str(tmp_path / "d")), tmp_path / "cache").manifest == manifest
    assert not (tmp_path / "cache").exists()
    state = availability(DataConfig(source=str(tmp_path / "d")), tmp_path / "cache")
    assert (state.state, state.num_rows, state.shape) == ("ingested", manifest.num_rows, manifest.shape)
    ensure_ingested(DataConfig(source=str(tmp_path / "d"), image_size=8, mode="L"), tmp_path / "cache")  # as it is
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"image_size": 4}, "ingested dataset of 8x8 with 1 channels, got another image size or mode"),
        ({"mode": "RGB"}, "got another image size or mode"),
        ({"split": "test"}, "split can no longer be chosen"),
    ]
    for settings, message in wrong:
        for ask in (ensure_ingested, availability):
            with pytest.raises(UsageError, match=message):
                ask(DataConfig(source=str(tmp_path / "d"), **settings), tmp_path / "cache")


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    source, said = str(write_npz(tmp_path / "x.npz", x=some_images(5))), list[str]()
    folder = ensure_ingested(DataConfig(source=source), tmp_path / "cache").folder
    shard = folder / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    ensure_ingested(DataConfig(source=source), tmp_path / "cache", said.append).verify()
    assert "shard-00000.parquet is missing or damaged" in said[0]
    assert said[-1].startswith("ingesting")


def test_a_missing_source_is_an_error_and_a_set_that_is_not_here_is_not(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        availability(DataConfig(source=str(tmp_path / "nowhere")), tmp_path / "cache")
    state = availability(DataConfig(source="cifar10"), tmp_path / "cache")
    assert state.state == "download"
    assert "it will be downloaded (170 MB from https://www.cs.toronto.edu/~kriz)" in state.text
    assert availability(DataConfig(), tmp_path / "cache").state == "here"
    assert everything_below(tmp_path) == set()


ENSURE = """
import sys
from pathlib import Path
from pipeline.config.experiment import DataConfig
from pipeline.ingest.ingest import ensure_ingested
print(ensure_ingested(DataConfig(source=sys.argv[1]), Path(sys.argv[2]), lambda text: print(text, flush=True)).folder)
"""


@pytest.mark.slow
def test_processes_that_want_the_same_dataset_make_it_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", some_images(3000, (8, 8, 3)))
    command = [sys.executable, "-c", ENSURE, str(folder), str(tmp_path / "cache")]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]) for _ in range(3)
    ]
    said = [process.communicate(timeout=60)[0].splitlines() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert sum(any(line.startswith("ingesting") for line in lines) for lines in said) == 1
    assert len({lines[-1] for lines in said}) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Path(said[0][-1]).name]


# -- real images ----------------------------------------------------------------------------------------------------------


def test_real_mnist(real_data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    manifest = ingest(str(real_data / "mnist"), tmp_path / "mnist", split="validation", say=said.append)
    assert (manifest.num_rows, manifest.shape, manifest.class_names) == (10_000, (1, 28, 28), tuple("0123456789"))
    dataset = Dataset.open(tmp_path / "mnist")
    labels = dataset.labels()
    assert labels is not None
    assert np.bincount(labels, minlength=10).min() > 800
    images = dataset.read(range(10_000))
    ones, zeros = (images[labels == digit].mean(axis=0)[0] for digit in (1, 0))
    assert ones[14, 14] > 150 > 60 > zeros[14, 14]  # a one has ink in the middle, a zero has a hole there
    dataset.verify()


@pytest.mark.slow
def test_real_cifar10(real_data: Path, tmp_path: Path) -> None:
    source = str(real_data / "cifar10" / "train-00000-*.parquet")
    alone = ingest(source, tmp_path / "a", num_workers=1)
    pool = ingest(source, tmp_path / "b", num_workers=2)
    assert alone.fingerprint == pool.fingerprint
    assert (alone.num_rows, alone.shape) == (10_000, (3, 32, 32))
    assert alone.class_names is not None
    assert alone.class_names[0] == "airplane"
    assert np.allclose((np.array(alone.mean) + 1) / 2, [0.491, 0.482, 0.447], atol=0.01)  # CIFAR-10's, well known
