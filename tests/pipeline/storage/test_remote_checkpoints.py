"""Faults 3, 6, 24 and 26 in an object store: whatever happens to an upload or to what was stored, the newest whole checkpoint is found."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.errors import CheckpointError, StorageError
from pipeline.storage import checkpoint as checkpoints
from pipeline.storage.checkpoint import MANIFEST, Checkpoint
from pipeline.storage.checkpoint_store import DAMAGED, CheckpointStore
from pipeline.storage.remote import RemoteFolder

FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", MANIFEST)


def saved(root: Path, step: int, attempt: int = 1) -> Checkpoint:
    tensors = {group: {"w": torch.full((40,), float(step))} for group in checkpoints.GROUPS}
    return checkpoints.save(root, step, attempt, tensors, {"step": step}, may_commit=lambda: True)


class Place:
    """A run's checkpoints in the store, with the folders of two machines."""

    def __init__(self, bucket: str, root: Path) -> None:
        self.folder = RemoteFolder(f"{bucket}/checkpoints")
        self.here, self.there = root / "here", root / "there"
        self.mine = CheckpointStore(self.here, self.folder)
        self.other = CheckpointStore(self.there, self.folder)

    def push(self, step: int, attempt: int = 1) -> Checkpoint:
        checkpoint = saved(self.here, step, attempt)
        self.mine.push(checkpoint, lambda: True)
        return checkpoint

    def newest_elsewhere(self) -> tuple[int, list[str]]:
        found = self.other.newest_verified()
        assert found.checkpoint is not None
        found.checkpoint.verify()
        assert found.checkpoint.state() == {"step": found.checkpoint.step}
        return found.checkpoint.step, found.warnings


@pytest.fixture
def place(bucket, tmp_path):
    return Place(bucket, tmp_path)


def test_a_machine_without_copies_removes_old_ones_unless_the_newest_is_short(place):
    older, newest = place.push(1), place.push(2)
    model = place.folder.read(f"{newest.folder.name}/model.safetensors")
    place.folder.write(f"{newest.folder.name}/model.safetensors", model[:-1])
    assert place.other.unneeded(1) == {}
    place.folder.write(f"{newest.folder.name}/model.safetensors", model)
    assert place.other.unneeded(1) == {older.folder.name: older.num_bytes + (older.folder / MANIFEST).stat().st_size}
    place.other.prune(1)
    assert [found.step for found in place.mine.committed()] == [2]


@pytest.mark.promise("P5")
def test_another_machine_finds_the_newest_with_equal_bytes(place, object_store):
    for step in (1, 2):
        sent = place.push(step)
    assert [c.step for c in place.other.committed()] == [2, 1]
    assert place.newest_elsewhere() == (2, [])
    for name in FILES:
        assert (place.there / sent.folder.name / name).read_bytes() == (sent.folder / name).read_bytes()
    object_store.requests.clear()
    assert place.newest_elsewhere() == (2, [])  # what is here already is not fetched again
    assert object_store.count("GET", "safetensors") == 0


@pytest.mark.fault(24)
def test_the_manifest_is_the_last_request_and_a_single_one(place, object_store):
    object_store.requests.clear()
    place.push(1)
    puts = [path for method, path in object_store.requests if method in ("PUT", "POST")]
    assert len(puts) == 5
    assert puts[-1].endswith(MANIFEST)


@pytest.mark.fault(24, 26)
@pytest.mark.promise("P5")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["gone", "empty", "short", "flipped"])
def test_an_object_that_is_gone_short_or_flipped_is_never_used_and_the_one_before_is(place, name, damage):
    place.push(1)
    folder = place.push(2).folder.name
    data = bytearray(place.folder.read(f"{folder}/{name}"))
    if damage == "gone":
        place.folder.delete(f"{folder}/{name}")
    else:
        data[len(data) // 2] ^= 1
        place.folder.write(f"{folder}/{name}", bytes({"empty": b"", "short": data[:-1], "flipped": data}[damage]))
    step, warnings = place.newest_elsewhere()
    assert step == 1
    if (name, damage) == (MANIFEST, "gone"):
        assert warnings == []  # that is no checkpoint at all
        return
    (warning,) = warnings
    assert warning.startswith(f"checkpoint {folder}: ")
    assert warning.endswith("an older checkpoint is used")
    assert place.folder.read(f"{folder}/{DAMAGED}") is not None
    assert place.newest_elsewhere() == (1, [])  # nobody has to find that out again


@pytest.mark.fault(26)
@pytest.mark.slow
def test_a_bit_flipped_anywhere_is_never_silent(place):
    place.push(1)
    folder, rng = place.push(2).folder.name, random.Random(0)
    whole = {name: place.folder.read(f"{folder}/{name}") for name in FILES}
    for _ in range(30):
        name = rng.choice(FILES[:-1])
        data = bytearray(whole[name])
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        place.folder.write(f"{folder}/{name}", bytes(data))
        shutil.rmtree(place.there, ignore_errors=True)
        assert place.newest_elsewhere()[0] == 1
        place.folder.write(f"{folder}/{name}", whole[name])
        place.folder.delete(f"{folder}/{DAMAGED}")
    assert place.newest_elsewhere() == (2, [])


@pytest.mark.fault(6, 24)
@pytest.mark.promise("P5")
@pytest.mark.parametrize("refused", FILES)
def test_an_upload_that_fails_at_any_object_leaves_the_one_before_and_can_be_done_again(place, object_store, refused):
    place.push(1)
    object_store.refuse = lambda method, path: method == "PUT" and path.endswith(f"step-0000000002-1/{refused}")
    checkpoint = saved(place.here, 2)
    with pytest.raises(StorageError, match=f"{refused}: the store says"):
        place.mine.push(checkpoint, lambda: True)
    assert place.newest_elsewhere() == (1, [])
    object_store.refuse = lambda method, path: False
    place.mine.push(checkpoint, lambda: True)
    assert place.newest_elsewhere() == (2, [])


def test_a_download_that_was_damaged_on_the_way_is_fetched_again(place, monkeypatch):
    place.push(1)
    download, damaged = RemoteFolder.download, []

    def once_damaged(self, name, path):
        sha256 = download(self, name, path)
        if name == "ema.safetensors" and not damaged:
            damaged.append(name)
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        return sha256

    monkeypatch.setattr(RemoteFolder, "download", once_damaged)
    assert place.newest_elsewhere() == (1, [])
    assert damaged


@pytest.mark.fault(19)
def test_a_writer_that_was_replaced_before_or_during_its_commit_commits_nothing(place):
    place.push(1, attempt=2)
    for answers in ([False], [True, False]):
        left = iter(answers)
        with pytest.raises(CheckpointError, match="attempt 1 was replaced by a later one"):
            place.mine.push(saved(place.here, 5), lambda left=left: next(left))
        assert place.newest_elsewhere() == (1, [])
        shutil.rmtree(place.here / "step-0000000005-1")


def test_the_remains_of_older_attempts_and_older_checkpoints_are_removed_once_the_newest_is_whole(place, object_store):
    for step in (1, 2, 3):
        place.push(step)
    object_store.refuse = lambda method, path: path.endswith(f"step-0000000004-1/{MANIFEST}")
    with pytest.raises(StorageError):
        place.push(4)
    object_store.refuse = lambda method, path: False
    place.push(5, attempt=2)
    place.mine.prune(keep=2)
    left = {entry.name.split("/")[0] for entry in place.folder.objects()}
    assert left == {"step-0000000005-2", "step-0000000003-1"}
    place.folder.write("step-0000000005-2/ema.safetensors", b"")
    place.mine.prune(keep=1)
    assert [c.step for c in place.mine.committed()] == [5, 3]
    assert place.newest_elsewhere()[0] == 3


def test_what_is_here_and_not_in_the_store_is_no_checkpoint_of_the_run(place):
    place.push(1)
    saved(place.here, 2)  # killed before it was sent
    found = place.mine.newest_verified()
    assert found.checkpoint is not None
    assert found.checkpoint.step == 1
    assert [c.step for c in CheckpointStore(place.here).committed()] == [1]


def test_a_manifest_that_names_files_elsewhere_fetches_nothing(place, tmp_path):
    folder = place.push(1).folder.name
    manifest = place.folder.read(f"{folder}/{MANIFEST}")
    place.folder.write(
        f"{folder}/{MANIFEST}", manifest.replace(b'"state.json"', b'"../../../escaped", "state.json"', 1)
    )
    evil = manifest.replace(b'"state.json": {', b'"../escaped": {"bytes": 1, "sha256": ""}, "state.json": {')
    place.folder.write(f"{folder}/{MANIFEST}", evil)
    found = place.other.newest_verified()
    assert found.checkpoint is None
    assert "a file outside it" in found.warnings[0]
    assert not list(tmp_path.rglob("*escaped*"))
