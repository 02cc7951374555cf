"""Checkpoints: complete or invisible, and never silently damaged."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from pipeline.errors import CheckpointError, StorageError
from pipeline.storage import checkpoint as checkpoints
from pipeline.storage.checkpoint_store import CheckpointStore
from pipeline.storage.durable import storage_errors
from tests.kit.forks import PROCESSES
from tests.kit.small_disk import SmallDisk, small_disk


def tensors(step: int) -> checkpoints.Tensors:
    generator = torch.Generator().manual_seed(step)
    return {
        group: {"w": torch.randn(50, generator=generator), "b": torch.randn(3, generator=generator)}
        for group in checkpoints.GROUPS
    }


def save(root: Path, step: int, attempt: int = 1) -> checkpoints.Checkpoint:
    return checkpoints.save(root, step, attempt, tensors(step), {"step": step}, may_commit=lambda: True)


def test_what_was_saved_is_loaded(tmp_path):
    loaded = save(tmp_path, 7).tensors()
    for group, expected in tensors(7).items():
        for name, tensor in expected.items():
            assert torch.equal(loaded[group][name], tensor)


def test_a_checkpoint_says_what_it_holds(tmp_path):
    """Its files, sizes and hashes, taken again; groups as they were named, of any number; sizes of every kind of number."""
    several = {
        "model": {"w": torch.ones(3, 5)[:, ::2], "n": torch.arange(7)},
        "ema-0.5": {"h": torch.zeros(9, dtype=torch.float16)},
        "a": {},
    }
    assert checkpoints.num_bytes(several) == 3 * 3 * 4 + 7 * 8 + 9 * 2
    saved = checkpoints.save(tmp_path / "far" / "away", 12, 3, several, {"x": [1, None]}, may_commit=lambda: True)
    assert saved == checkpoints.Checkpoint(tmp_path / "far" / "away" / "step-0000000012-3", 12, 3)
    assert saved.state() == {"x": [1, None]}
    assert sorted(saved.groups()) == ["a", "ema-0.5", "model"]
    loaded, some = saved.tensors(), saved.tensors("ema-0.5")
    assert list(some) == ["ema-0.5"]
    for group, expected in several.items():
        assert loaded[group].keys() == expected.keys()
        assert all(torch.equal(loaded[group][name], tensor) for name, tensor in expected.items())
    files = {path.name: path.read_bytes() for path in saved.folder.iterdir() if path.name != checkpoints.MANIFEST}
    assert saved.manifest() == {
        "format": 1,
        "step": 12,
        "attempt": 3,
        "groups": ["a", "ema-0.5", "model"],
        "files": {name: {"bytes": len(b), "sha256": hashlib.sha256(b).hexdigest()} for name, b in files.items()},
    }
    assert saved.num_bytes == sum(map(len, files.values()))
    saved.verify()
    with pytest.raises(CheckpointError, match=r"holds no optimizer\.safetensors"):
        saved.tensors("optimizer")


@pytest.mark.fault(3)
@pytest.mark.promise("P5")
def test_all_is_on_the_disk_before_the_commit_and_the_commit_before_the_save_returns(tmp_path, monkeypatch):
    """What is flushed, in order, with the size it has then; `may_commit` is asked when nothing but the manifest is missing."""
    flushed, asked, really = [], [], os.fsync
    folder = tmp_path / checkpoints.name_of(4, 1)

    def fsync(descriptor):
        stat = os.fstat(descriptor)
        flushed.append((stat.st_ino, stat.st_size, (folder / checkpoints.MANIFEST).exists()))
        really(descriptor)

    def may_commit():
        asked.append(sorted(path.name for path in folder.iterdir()))
        return True

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoints.save(tmp_path, 4, 1, tensors(4), {}, may_commit=may_commit)
    names = [*(f"{group}.safetensors" for group in checkpoints.GROUPS), checkpoints.STATE]
    assert asked == [sorted(names)]
    *files, first, manifest, second, root = flushed
    inode = {path: path.stat().st_ino for path in (tmp_path, folder, *folder.iterdir())}
    assert sorted(files) == sorted((inode[folder / n], (folder / n).stat().st_size, False) for n in names)
    assert (first[0], first[2]) == (inode[folder], False)
    written = folder / checkpoints.MANIFEST
    assert manifest == (inode[written], written.stat().st_size, False)
    assert [(place, committed) for place, _, committed in (second, root)] == [
        (inode[folder], True),
        (inode[tmp_path], True),
    ]
    descriptors = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    checkpoints.save(tmp_path, 5, 1, tensors(5), {}, may_commit=may_commit)
    assert descriptors == 0 or len(os.listdir("/proc/self/fd")) == descriptors


def test_a_committed_checkpoint_is_not_written_again_and_remains_are(tmp_path):
    first = save(tmp_path, 3)
    before = {path: path.stat() for path in first.folder.iterdir()}
    assert checkpoints.save(tmp_path, 3, 1, tensors(9), {}, may_commit=lambda: False) == first
    assert {path: path.stat() for path in first.folder.iterdir()} == before
    remains = tmp_path / checkpoints.name_of(4, 1)
    remains.mkdir()
    (remains / "model.safetensors").write_text("cut off")
    (remains / "other").write_text("")
    assert save(tmp_path, 4).tensors().keys() == set(checkpoints.GROUPS)
    assert not (remains / "other").exists()


@pytest.mark.fault(3, 6)
@pytest.mark.promise("P5")
def test_a_disk_that_fails_after_the_commit_leaves_it_and_one_that_fails_before_leaves_nothing(tmp_path, monkeypatch):
    really = os.fsync
    for committed in (False, True):
        folder = tmp_path / checkpoints.name_of(1 + committed, 1)

        def fsync(descriptor, folder=folder, committed=committed):
            if (folder / checkpoints.MANIFEST).exists() is committed and (folder / checkpoints.STATE).exists():
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            really(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(StorageError, match=r"cannot be written \(Input/output error\); make the folder writable"):
            save(tmp_path, 1 + committed)
        assert folder.exists() is committed
    assert [c.step for c in CheckpointStore(tmp_path).committed()] == [2]
    assert CheckpointStore(tmp_path).newest_verified().warnings == []


@pytest.mark.fault(7)
@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, "storage full: .* MB left at"),
        (errno.EDQUOT, "storage full"),
        (errno.EFBIG, "storage full"),
        (errno.EROFS, r"cannot be written \(Read-only file system\)"),
    ],
)
def test_what_the_system_says_of_a_place_is_one_line(tmp_path, monkeypatch, number, told):
    def fails(root):
        with storage_errors(root):
            raise OSError(number, os.strerror(number))

    free = shutil.disk_usage(tmp_path)._replace(free=7_340_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    for root in (tmp_path, tmp_path / "gone"):
        with pytest.raises(StorageError, match=told) as error:
            fails(root)
        assert "\n" not in str(error.value)
        assert "full" not in told or f"storage full: 7.3 MB left at {root}" in str(error.value)


@pytest.mark.fault(18)
def test_newest_is_by_step_then_attempt_whatever_the_clock_says(tmp_path):
    for step, attempt in [(20, 1), (100, 2), (100, 10), (3, 11)]:
        folder = save(tmp_path, step, attempt).folder
        os.utime(folder / checkpoints.MANIFEST, (4e9 - step, 4e9 - step))
    found = CheckpointStore(tmp_path).newest_verified().checkpoint
    assert found is not None
    assert (found.step, found.attempt) == (100, 10)


@pytest.mark.fault(26)
@pytest.mark.promise("P5")
def test_300_single_bit_flips_are_all_found_and_the_older_checkpoint_used(tmp_path):
    # torch.load alone lets 292 of 300 such flips pass
    save(tmp_path, 1)
    newer = save(tmp_path, 2)
    choose = random.Random(0)
    files = sorted(path for path in newer.folder.iterdir() if path.name != checkpoints.MANIFEST)
    for _ in range(300):
        path = choose.choice(files)
        data = bytearray(path.read_bytes())
        position, bit = choose.randrange(len(data)), 1 << choose.randrange(8)
        data[position] ^= bit
        path.write_bytes(data)
        found = CheckpointStore(tmp_path).newest_verified()
        assert found.checkpoint is not None
        assert found.checkpoint.step == 1
        assert path.name in found.warnings[0]
        data[position] ^= bit
        path.write_bytes(data)
    again = CheckpointStore(tmp_path).newest_verified().checkpoint
    assert again is not None
    assert again.step == 2


@pytest.mark.fault(24)
@pytest.mark.promise("P5")
@pytest.mark.parametrize("name", [*(f"{group}.safetensors" for group in checkpoints.GROUPS), checkpoints.STATE])
@pytest.mark.parametrize("damage", ["short", "empty", "gone"])
def test_a_file_that_is_short_or_gone_makes_the_older_one_the_newest(tmp_path, name, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2).folder / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if damage == "short" else b"")
    found = CheckpointStore(tmp_path).newest_verified()
    assert found.checkpoint is not None
    assert found.checkpoint.step == 1


@pytest.mark.fault(26)
def test_damaged_manifests_never_raise_anything_else(tmp_path):
    save(tmp_path, 1)
    manifest = save(tmp_path, 2).folder / checkpoints.MANIFEST
    whole = manifest.read_text()
    outside = json.loads(whole)
    outside["files"]["../escape"] = outside["files"].pop(checkpoints.STATE)
    itself = json.loads(whole)
    itself["files"][checkpoints.MANIFEST] = itself["files"][checkpoints.STATE]
    fewer, stateless, bare = json.loads(whole), json.loads(whole), json.loads(whole)
    del fewer["files"]["ema.safetensors"], stateless["files"][checkpoints.STATE]
    bare["files"][checkpoints.STATE] = 5
    unread = r"step-0000000002-1: its manifest cannot be read \({}\)"
    damages = {
        "": unread.format("JSONDecodeError"),
        "{": unread.format("JSONDecodeError"),
        "[]": unread.format("TypeError"),
        "{}": unread.format("KeyError"),
        '{"format": 1, "files": []}': unread.format("AttributeError"),
        whole[: len(whole) // 2]: unread.format("JSONDecodeError"),
        json.dumps(bare): unread.format("TypeError"),
        json.dumps(outside): "its manifest does not name all files",
        json.dumps(
            outside | {"files": outside["files"] | {checkpoints.STATE: outside["files"]["../escape"]}}
        ): "names a file outside it",
        json.dumps(itself): "its manifest names a file outside it",
        json.dumps(fewer): "its manifest does not name all files",
        json.dumps(stateless): "its manifest does not name all files",
        # the groups that are always there, where an early release named none
        json.dumps({name: value for name, value in fewer.items() if name != "groups"}): "does not name all files",
    }
    for text, told in damages.items():
        manifest.write_text(text)
        found = CheckpointStore(tmp_path).newest_verified()
        assert found.checkpoint is not None
        assert found.checkpoint.step == 1
        assert len(found.warnings) == 1
        assert re.search(told, found.warnings[0]), (text, found.warnings)
        assert found.warnings[0].endswith("; an older checkpoint is used")
    manifest.write_text(json.dumps({name: value for name, value in json.loads(whole).items() if name != "groups"}))
    assert CheckpointStore(tmp_path).newest_verified().warnings == []
    manifest.unlink()
    with pytest.raises(CheckpointError, match=unread.format("FileNotFoundError")):
        checkpoints.Checkpoint(manifest.parent, 2, 1).manifest()


@pytest.mark.fault(26)
@pytest.mark.promise("P5")
def test_where_none_verifies_each_is_reported_and_none_is_used(tmp_path):
    assert CheckpointStore(tmp_path / "nothing").newest_verified() == checkpoints.Found(None)
    for step in (1, 2, 3):
        (save(tmp_path, step).folder / "ema.safetensors").write_bytes(b"x" * step)
    (tmp_path / "step-0000000009-1.old").mkdir()
    (tmp_path / "step-0000000008-1").mkdir()  # not committed
    found = CheckpointStore(tmp_path).newest_verified()
    assert found.checkpoint is None
    size = save(tmp_path / "whole", 1).manifest()["files"]["ema.safetensors"]["bytes"]
    assert [line.partition(": ")[2].partition(";")[0] for line in found.warnings] == [
        f"ema.safetensors has {step} bytes, {size} were committed" for step in (3, 2, 1)
    ]


@pytest.mark.fault(23)
def test_a_newer_format_is_refused_by_name(tmp_path):
    manifest = save(tmp_path, 1).folder / checkpoints.MANIFEST
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 3'))
    with pytest.raises(CheckpointError, match=r"format 3, and this ddpm-pipe reads up to 1"):
        CheckpointStore(tmp_path).newest_verified()


@pytest.mark.fault(19)
def test_a_writer_that_was_replaced_does_not_commit(tmp_path):
    with pytest.raises(CheckpointError, match="replaced"):
        checkpoints.save(tmp_path, 5, 1, tensors(5), {}, may_commit=lambda: False)
    assert CheckpointStore(tmp_path).newest_verified().checkpoint is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.promise("P5")
def test_pruning_keeps_the_newest_and_stops_where_the_newest_is_damaged(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / checkpoints.name_of(2, 0)).mkdir()  # remains of an older attempt
    CheckpointStore(tmp_path).prune(keep=2)
    assert [c.step for c in CheckpointStore(tmp_path).committed()] == [3, 2]
    assert not (tmp_path / checkpoints.name_of(2, 0)).exists()
    newest = save(tmp_path, 4)
    (newest.folder / "model.safetensors").write_bytes(b"")
    CheckpointStore(tmp_path).prune(keep=2)
    assert [c.step for c in CheckpointStore(tmp_path).committed()] == [4, 3, 2]


def test_pruning_leaves_alone_what_may_still_be_written_and_what_is_not_its_own(tmp_path):
    CheckpointStore(tmp_path / "nothing").prune(keep=1)
    (tmp_path / checkpoints.name_of(1, 1)).mkdir()
    CheckpointStore(tmp_path).prune(keep=1)  # without a committed one nothing is known to be remains
    assert [path.name for path in tmp_path.iterdir()] == [checkpoints.name_of(1, 1)]
    for step, attempt in ((5, 1), (6, 2), (7, 3)):
        save(tmp_path, step, attempt)
    kept = [checkpoints.name_of(9, 3), checkpoints.name_of(8, 4), "step-0000000001-1.copy"]
    for name in (*kept, checkpoints.name_of(2, 2)):
        (tmp_path / name).mkdir()
    (tmp_path / "step-0000000002-1").write_text("a file in the way cannot be removed as a folder, and is left")
    CheckpointStore(tmp_path).prune(keep=2)
    left = {path.name for path in tmp_path.iterdir()} - {"step-0000000002-1"}
    assert left == {*kept, checkpoints.name_of(6, 2), checkpoints.name_of(7, 3)}
    (tmp_path / checkpoints.name_of(7, 3) / "state.json").write_bytes(b"")
    CheckpointStore(tmp_path).prune(keep=1)
    assert [c.step for c in CheckpointStore(tmp_path).committed()] == [7, 6]


@pytest.mark.fault(6)
def test_room_for_a_checkpoint_and_a_little_more_is_enough(tmp_path, monkeypatch):
    """2.2 times the 3 * 53 float32 numbers, to the byte."""
    usage, need = shutil.disk_usage(tmp_path), int(3 * 53 * 4 * 2.2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=need))
    assert save(tmp_path, 1).step == 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=need - 1))
    with pytest.raises(StorageError, match=r"storage full: need 0\.0 MB for a checkpoint, have 0\.0 MB at "):
        save(tmp_path, 2)


@pytest.mark.fault(6)
def test_a_place_without_room_is_refused_before_a_byte_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(StorageError, match="storage full: need"):
        save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_folder_should_be_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        save(tmp_path / "file" / "checkpoints", 1)


@pytest.fixture
def disk(tmp_path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path, "size=1m") as disk:
        yield disk


def require_only_the_first(root: Path) -> None:
    """Require that the checkpoint of step 1 is whole and that nothing is left of the other one."""
    found = CheckpointStore(root).newest_verified()
    assert found.checkpoint is not None
    assert (found.checkpoint.step, found.warnings) == (1, [])
    assert len(list(root.iterdir())) == 1


@pytest.mark.fault(6)
@pytest.mark.promise("P5")
def test_a_disk_without_a_free_file_leaves_the_older_checkpoint_alone_whichever_file_it_was(disk):
    root = disk.inside / "checkpoints"
    save(root, 1)
    for more in range(6):  # a folder and its five files
        disk.mount(f"remount,nr_inodes={disk.num_files() + more}")
        with pytest.raises(StorageError, match="storage full: no inodes left"):
            save(root, 2)
        require_only_the_first(root)
    disk.mount(f"remount,nr_inodes={disk.num_files() + 6}")
    assert save(root, 2).step == 2


@pytest.mark.fault(6)
@pytest.mark.promise("P5")
def test_a_disk_that_runs_full_while_a_file_is_written_leaves_the_older_checkpoint_alone(disk):
    root = disk.inside / "checkpoints"
    save(root, 1)
    state = {"undelivered": "x" * 2**20}  # the room for it is not asked for beforehand
    with pytest.raises(StorageError, match=r"storage full: 0\.\d MB left"):
        checkpoints.save(root, 2, 1, tensors(2), state, may_commit=lambda: True)
    require_only_the_first(root)
    disk.fill()
    with pytest.raises(StorageError, match=r"storage full: need 0\.0 MB for a checkpoint, have 0\.0 MB"):
        save(root, 2)
    disk.empty()
    assert save(root, 2).step == 2


@pytest.mark.fault(7)
@pytest.mark.promise("P5")
def test_a_disk_that_is_read_only_is_reported(disk):
    root = disk.inside / "checkpoints"
    save(root, 1)
    disk.mount("remount,ro")
    with pytest.raises(StorageError, match=r"cannot be written \(Read-only file system\)"):
        save(root, 2)
    require_only_the_first(root)


FOLDER, TEMPORARY = checkpoints.name_of(2, 1), checkpoints.MANIFEST + ".tmp"
# the calls by which a save changes the disk, in their order, and what each is about
CHANGES = [
    ("mkdir", FOLDER),
    *(
        (call, name)
        for name in (*(f"{group}.safetensors" for group in checkpoints.GROUPS), checkpoints.STATE)
        for call in ("openat", "write", "fsync")
    ),
    ("fsync", FOLDER),
    *((call, TEMPORARY) for call in ("openat", "write", "fsync")),
    ("rename", TEMPORARY),
    ("fsync", FOLDER),
    ("fsync", "checkpoints"),
]
COMMIT = CHANGES.index(("rename", TEMPORARY))
# these leave the disk as it is; any other call is held to change it
LOOKS = {
    "stat",
    "lstat",
    "newfstatat",
    "fstat",
    "statx",
    "statfs",
    "fstatfs",
    "lseek",
    "ioctl",
    "fcntl",
    "getdents64",
    "close",
}
CALL = re.compile(r"^\d+ +(\w+)\((?:\d+<([^>]*)>|(?:AT_FDCWD[^,]*, )?\"([^\"]*)\")(.*)$")


def save_when_told(root: Path, pipe: Connection) -> None:
    with contextlib.suppress(AttributeError):  # where a kernel lets only parents trace
        ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(2**64 - 1), 0, 0, 0)  # PR_SET_PTRACER, PR_SET_PTRACER_ANY
    pipe.send("ready")
    pipe.recv()
    save(root, 2)


def traced_save(root: Path, *options: str) -> int | None:
    """Save step 2 in a process under strace, which sees the calls that are about the checkpoint; return the process's exit code."""
    folder = root / FOLDER
    names = [name for _, name in CHANGES if name not in (FOLDER, "checkpoints")]
    about = [root, folder, *(folder / name for name in dict.fromkeys([*names, checkpoints.MANIFEST]))]
    mine, its = PROCESSES.Pipe()
    process = PROCESSES.Process(target=save_when_told, args=(root, its))
    process.start()
    its.close()
    assert mine.recv() == "ready"
    paths = [word for path in about for word in ("-P", str(path))]
    command = ["strace", "-f", "-y", *paths, *options, "-p", str(process.pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        while "attached" not in (line := strace.stderr.readline()):
            assert line, "strace did not attach"
        mine.send("go")
        process.join()
        strace.communicate()
    return process.exitcode


@pytest.mark.fault(3)
@pytest.mark.promise("P5")
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_kill_at_any_system_call_of_a_save_leaves_a_checkpoint_that_verifies(tmp_path):
    root, trace = tmp_path / "traced" / "checkpoints", tmp_path / "trace"
    save(root, 1)
    assert traced_save(root, "-o", str(trace)) == 0
    counted: Counter[str] = Counter()
    changes, sites = [], []
    for line in trace.read_text().splitlines():
        match = CALL.match(line)
        if match is None:
            assert "+++ exited" in line, line
            continue
        call, descriptor, path, rest = match.groups()
        counted[call] += 1
        if call in LOOKS or (call == "openat" and "O_CREAT" not in rest) or ") = -1 " in rest:
            continue
        changes.append((call, Path(descriptor or path).name))
        sites.append((call, counted[call]))
    assert changes == CHANGES

    for number, (call, nth) in enumerate(sites):
        root = tmp_path / str(number) / "checkpoints"
        save(root, 1)
        kill = ["-o", "/dev/null", "-e", f"inject={call}:signal=KILL:when={nth}"]
        assert traced_save(root, *kill) == -signal.SIGKILL, CHANGES[number]
        found = CheckpointStore(root).newest_verified()
        assert found.checkpoint is not None
        # the kill arrives as a call begins
        assert (found.checkpoint.step, found.warnings) == (2 if number > COMMIT else 1, []), CHANGES[number]
        assert save(root, 3).step == 3  # and the place can be written again
