"""Datasets in an object store: batches bit for bit those of the disk, shards fetched once and verified, copies bounded and shared."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pickle
import random
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.cluster_profile import Cache
from pipeline.config.experiment import DataConfig
from pipeline.data.manifest import MANIFEST_FILE, Manifest
from pipeline.data.order import Order
from pipeline.data.shards import Dataset, read_batches
from pipeline.errors import DataError, StorageError, UsageError
from pipeline.ingest.ingest import availability, ensure_ingested, held_out_location, ingest
from pipeline.pictures.pictures import inspect_picture
from pipeline.storage.durable import locked
from pipeline.storage.remote import RemoteFolder
from pipeline.storage.remote_cache import NodeCache
from tests.kit.object_store import objects

PROCESSES = multiprocessing.get_context("spawn")
FROM_DISK = 0  # bytes that may be held in memory
ROWS_PER_SHARD = 128  # of 64x64 in colour: one row group
NUM_ROWS = 1000


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("source") / "images.npz"
    images = rng.integers(0, 256, (NUM_ROWS, 64, 64, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=rng.integers(0, 7, NUM_ROWS))
    return str(path)


@pytest.fixture(scope="module")
def on_disk(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "images"
    ingest(source, folder, rows_per_shard=ROWS_PER_SHARD)
    return folder


@pytest.fixture
def in_store(bucket, on_disk) -> str:
    """The same dataset in a store, as files that were copied there."""
    address = f"{bucket}/data/images"
    for path in sorted(on_disk.iterdir()):
        RemoteFolder(address).upload(path.name, path)
    return address


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(folder=str(tmp_path / "cache"))


def copies(cache: Cache) -> list[Path]:
    assert cache.folder is not None
    return [path for path in Path(cache.folder).glob("??/*") if path.is_file()]


def first_batches(dataset: Dataset, steps: int, budget: int, start: int = 0) -> list[tuple[bytes, bytes, bytes]]:
    order = Order(row_groups=dataset.manifest.row_groups, seed=3, num_streams=4, batch_size=32, window=300)
    batches = read_batches(dataset, order, range(4), start, memory_budget_bytes=budget)
    taken = (next(batches) for _ in range(steps))
    return [(b.images.tobytes(), b.labels.tobytes(), b.rows.tobytes()) for b in taken]


@pytest.mark.parametrize("budget", [FROM_DISK, 2**30])
def test_batches_are_those_of_the_disk_bit_for_bit_whatever_fits_the_cache(on_disk, in_store, cache, budget):
    steps = 70  # more than two epochs
    expected = first_batches(Dataset.open(on_disk), steps, budget)
    assert first_batches(Dataset.open(in_store, cache), steps, budget) == expected
    size = sum(shard.num_bytes for shard in Manifest.load(on_disk).shards)
    small = cache.model_copy(update={"folder": f"{cache.folder}-small", "max_gb": size / 4 / 1e9})
    assert first_batches(Dataset.open(in_store, small), 30, budget, 40) == expected[40:]


def test_opening_fetches_nothing_but_the_manifest_and_reading_fetches_what_is_needed_once(
    in_store, cache, object_store
):
    object_store.requests.clear()
    dataset = Dataset.open(in_store, cache)
    assert object_store.count("GET", "parquet") == 0
    dataset.read([0, ROWS_PER_SHARD - 1])
    dataset.read([5])
    (copy,) = copies(cache)
    assert copy.name == dataset.manifest.shards[0].sha256
    fetched = object_store.count("GET", "parquet")
    Dataset.open(in_store, cache).read([7])
    assert object_store.count("GET", "parquet") == fetched > 0
    dataset.verify()
    assert len(copies(cache)) == len(dataset.manifest.shards)


def test_a_dataset_that_is_sent_to_another_process_is_opened_there_from_its_place(in_store, on_disk, cache):
    sent = pickle.loads(pickle.dumps(Dataset.open(in_store, cache)))  # noqa: S301
    assert sent.place == (in_store, cache)
    assert np.array_equal(sent.read([3]), Dataset.open(on_disk).read([3]))
    assert len(copies(cache)) == 1
    assert pickle.loads(pickle.dumps(Dataset.open(on_disk))).place == (str(on_disk), None)  # noqa: S301


def test_the_default_cache_is_the_users_own_in_the_machines_temporary_folder(in_store, scratch):
    Dataset.open(in_store).read([0])
    root = scratch / f"ddpm-pipe-{os.getuid()}"
    assert root.stat().st_mode & 0o777 == 0o700
    assert list((root / "shards").glob("??/*"))
    root.chmod(0o777)
    with pytest.raises(StorageError, match="can be written by one; set TMPDIR"):
        Dataset.open(in_store)


@pytest.mark.fault(8)
@pytest.mark.parametrize("damage", ["gone", "short"])
def test_a_shard_that_is_missing_or_short_is_refused_before_anything_is_fetched(in_store, cache, damage, object_store):
    folder, name = RemoteFolder(in_store), "shard-00003.parquet"
    data = folder.read(name)
    assert data is not None
    folder.delete(name)
    if damage == "short":
        folder.write(name, data[:-1])
    object_store.requests.clear()
    with pytest.raises(DataError, match=f"{in_store}/{name} (is missing|has {len(data) - 1} bytes)"):
        Dataset.open(in_store, cache)
    assert object_store.count("GET", "parquet") == 0


@pytest.mark.fault(9)
def test_a_shard_with_a_flipped_bit_is_fetched_twice_and_refused_by_its_name(in_store, cache, object_store):
    folder, name = RemoteFolder(in_store), "shard-00001.parquet"
    whole = folder.read(name)
    assert whole is not None
    rng = random.Random(0)
    for _ in range(5):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 4
        folder.write(name, bytes(data))
        object_store.requests.clear()
        with pytest.raises(DataError, match=f"{in_store}/{name} is damaged .*restore it or ingest again"):
            Dataset.open(in_store, cache).read([ROWS_PER_SHARD])
        assert copies(cache) == []


def test_a_damaged_download_is_fetched_again(on_disk, in_store, cache, monkeypatch):
    download, damaged = RemoteFolder.download, []

    def once_damaged(self, name, path):
        sha256 = download(self, name, path)
        if damaged:
            return sha256
        damaged.append(name)
        return "0" * 64

    monkeypatch.setattr(RemoteFolder, "download", once_damaged)
    assert np.array_equal(Dataset.open(in_store, cache).read([1]), Dataset.open(on_disk).read([1]))
    assert damaged


@pytest.mark.fault(9)
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_copy_that_this_machines_disk_damaged_is_fetched_again(on_disk, in_store, cache, in_memory):
    Dataset.open(in_store, cache).read([0])
    (copy,) = copies(cache)
    data = bytearray(copy.read_bytes())
    data[200:1200] = bytes(1000)
    copy.write_bytes(bytes(data))
    dataset = Dataset.open(in_store, cache)
    rows = np.arange(ROWS_PER_SHARD)
    if in_memory:
        dataset.hold_in_memory()
    assert np.array_equal(dataset.read(rows), Dataset.open(on_disk).read(rows))
    assert copy.read_bytes() != bytes(data)


def test_an_address_that_holds_no_dataset_is_reported(bucket, cache):
    with pytest.raises(DataError, match=f"{bucket}/nothing is not an ingested dataset"):
        Dataset.open(f"{bucket}/nothing", cache)


# -- the cache


def put(cache: NodeCache, content: bytes, fetched: list[bytes] | None = None):
    import hashlib

    def fetch(path: Path) -> str:
        path.write_bytes(content)
        if fetched is not None:
            fetched.append(content)
        return hashlib.sha256(content).hexdigest()

    return cache.use(hashlib.sha256(content).hexdigest(), len(content), "the place", fetch)


def test_the_longest_unused_go_first_and_what_is_in_use_never(tmp_path):
    cache, contents = NodeCache(tmp_path, 3000), [bytes([i]) * 1000 for i in range(6)]
    for content in contents[:3]:
        with put(cache, content) as path:
            assert path.read_bytes() == content
        time.sleep(0.01)
    with put(cache, contents[0]):  # used again
        pass
    here = lambda: {path.read_bytes()[0] for path in tmp_path.glob("??/*")}  # noqa: E731
    with put(cache, contents[3]):
        assert here() == {0, 2, 3}
    with put(cache, contents[2]), put(cache, contents[0]), put(cache, contents[3]), put(cache, contents[4]) as path:
        assert here() == {0, 2, 3, 4}  # more than there is room for, while all are in use
        assert path.read_bytes() == contents[4]
    with put(cache, contents[5]):
        assert len(here()) == 3


def use_at_random(folder: str, seed: int, pipe: Connection) -> None:
    rng, cache, fetched = random.Random(seed), NodeCache(Path(folder), 5000), []
    for _ in range(150):
        content = bytes([rng.randrange(12)]) * 1000
        with put(cache, content, fetched) as path:
            assert path.read_bytes() == content
            time.sleep(rng.random() / 1000)
            assert path.read_bytes() == content  # still there
    pipe.send(len(fetched))


@pytest.mark.slow
def test_processes_share_a_cache_that_stays_within_its_bound(tmp_path):
    pipes = [PROCESSES.Pipe(duplex=False) for _ in range(3)]
    processes = [
        PROCESSES.Process(target=use_at_random, args=(str(tmp_path), i, its)) for i, (_, its) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    largest = 0
    while any(process.is_alive() for process in processes):
        sizes = {}
        with locked(tmp_path):  # nothing is removed meanwhile, so nothing begins to come
            for path in tmp_path.glob("??/*"):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    sizes[status.st_ino] = status.st_size
        largest = max(largest, sum(sizes.values()))
    for process, (mine, its) in zip(processes, pipes, strict=True):
        process.join()
        assert process.exitcode == 0
        assert mine.recv() > 12  # so that there was something to remove
        mine.close()
        its.close()
        process.close()
    assert 0 < largest <= 5000
    assert not list(tmp_path.rglob("*.part"))


def test_a_file_is_fetched_once_by_all_who_ask_at_once(tmp_path):
    cache, fetched, content = NodeCache(tmp_path, 10**6), [], b"x" * 1000

    def ask() -> None:
        with put(cache, content, fetched) as path:
            assert path.read_bytes() == content

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1


def test_who_has_fetched_a_file_removes_nothing_of_the_next_one_that_begins(tmp_path, monkeypatch):
    rename, others = Path.rename, []

    def rename_and_let_another_begin(part: Path, path: Path) -> Path:
        renamed = rename(part, path)
        others.append(part)
        part.touch()
        return renamed

    monkeypatch.setattr(Path, "rename", rename_and_let_another_begin)
    with put(NodeCache(tmp_path, 10**6), b"x" * 1000):
        pass
    (other,) = others
    assert other.exists()


# -- ingest


def test_ingest_writes_the_bytes_of_the_disk_and_the_manifest_last(source, on_disk, bucket, object_store, cache):
    address = f"{bucket}/data/mine"
    object_store.requests.clear()
    manifest = ingest(source, address, rows_per_shard=ROWS_PER_SHARD)
    assert manifest == Manifest.load(on_disk)
    sent = [path for method, path in object_store.requests if method == "PUT" and "lease" not in path]
    assert sent[-1].endswith(MANIFEST_FILE)
    assert objects(address) == sorted(path.name for path in on_disk.iterdir())
    assert all(RemoteFolder(address).read(path.name) == path.read_bytes() for path in on_disk.iterdir())
    Dataset.open(address, cache).verify()
    with pytest.raises(UsageError, match=f"{address} is not empty"):
        ingest("digits", address)


def test_an_ingest_that_fails_leaves_nothing(source, bucket, object_store, scratch):
    address = f"{bucket}/data/mine"
    object_store.refuse = lambda method, path: method == "PUT" and path.endswith("shard-00002.parquet")
    with pytest.raises(Exception, match=r"shard-00002\.parquet: the store says"):
        ingest(source, address, rows_per_shard=ROWS_PER_SHARD)
    object_store.refuse = lambda method, path: False
    assert objects(address) == []
    assert not [path for path in scratch.rglob("*") if path.is_file()]


def test_a_source_is_ingested_into_the_store_once_and_known_there_by_every_machine(bucket, tmp_path, cache, home):
    datasets, said = f"{bucket}/ddpm/datasets", []
    assert availability(DataConfig(), datasets).state == "here"
    made = ensure_ingested(DataConfig(), datasets, said.append, cache=cache)
    again = ensure_ingested(DataConfig(), datasets, said.append, cache=cache)
    assert made.location == again.location
    assert made.location.startswith(f"{datasets}/digits-")
    assert len([text for text in said if text.startswith("ingesting")]) == 1
    assert availability(DataConfig(), datasets).state == "cached"
    found = availability(DataConfig(source=made.location), tmp_path)
    assert (found.state, found.num_rows, found.shape) == ("ingested", 1797, (1, 8, 8))
    assert np.array_equal(made.read([3, 2]), Dataset.open(ensure_ingested(DataConfig(), tmp_path).folder).read([3, 2]))


@pytest.mark.slow
def test_inspect_and_a_dry_run_fetch_no_shard(in_store, on_disk, cli, object_store, tmp_path, home):
    object_store.requests.clear()
    environment = {name: os.environ[name] for name in os.environ if name.startswith("AWS_")}
    shown = cli("inspect", in_store, "--json", env=environment)
    assert shown.code == 0, shown.stderr
    assert json.loads(shown.stdout)["images"] == NUM_ROWS
    planned = cli(
        "train",
        "--data",
        in_store,
        "-s",
        "evaluation.enabled=false",
        "--dry-run",
        "--no-probe",
        "--json",
        env=environment,
    )
    assert planned.code == 0, planned.stderr
    assert str(NUM_ROWS) in planned.stdout
    assert object_store.count("GET", "parquet") == 0
    picture = cli("inspect", in_store, "--verify", "--picture", "grid.png", env=environment)
    assert picture.code == 0, picture.stderr
    inspect_picture(Dataset.open(on_disk), tmp_path / "wanted.png")
    assert (home / "grid.png").read_bytes() == (tmp_path / "wanted.png").read_bytes()
    RemoteFolder(in_store).write("shard-00000.parquet", b"?")
    refused = cli("inspect", in_store, env=environment)
    assert (refused.code, refused.stderr.count("\n")) == (3, 1)


def test_images_are_held_out_of_a_dataset_in_a_store(bucket, cache, dataset) -> None:
    """Both parts are in the store; the address of the one follows from that of the other, which has options."""
    rest = ensure_ingested(DataConfig(), f"{bucket}/datasets", holdout=0.1, cache=cache)
    held_out = Dataset.open(held_out_location(rest.location), cache)
    assert len(rest) + len(held_out) == len(dataset)
    assert held_out.manifest.name == "digits-holdout"
    assert held_out_location("s3://b/d?endpoint=x") == "s3://b/d-holdout?endpoint=x"
    assert held_out_location("/home/me/a?b") == "/home/me/a?b-holdout"
    again = ensure_ingested(DataConfig(source=rest.location), f"{bucket}/datasets", holdout=0.2, cache=cache)
    assert len(again) < len(rest)
