"""Checkpoints: complete or invisible, and never silently damaged."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.errors import CheckpointError, StorageError
from pipeline.storage import checkpoint as checkpoints


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


@pytest.mark.fault(18)
def test_newest_is_by_step_then_attempt_whatever_the_clock_says(tmp_path):
    for step, attempt in [(20, 1), (100, 2), (100, 10), (3, 11)]:
        folder = save(tmp_path, step, attempt).folder
        os.utime(folder / checkpoints.MANIFEST, (4e9 - step, 4e9 - step))
    found = checkpoints.newest_verified(tmp_path).checkpoint
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
        found = checkpoints.newest_verified(tmp_path)
        assert found.checkpoint is not None
        assert found.checkpoint.step == 1
        assert path.name in found.warnings[0]
        data[position] ^= bit
        path.write_bytes(data)
    again = checkpoints.newest_verified(tmp_path).checkpoint
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
    found = checkpoints.newest_verified(tmp_path)
    assert found.checkpoint is not None
    assert found.checkpoint.step == 1


@pytest.mark.fault(26)
def test_damaged_manifests_never_raise_anything_else(tmp_path):
    save(tmp_path, 1)
    manifest = save(tmp_path, 2).folder / checkpoints.MANIFEST
    whole = manifest.read_text()
    outside = json.loads(whole)
    outside["files"]["../escape"] = outside["files"].pop(checkpoints.STATE)
    for text in ["", "{", "[]", "{}", whole[: len(whole) // 2], json.dumps(outside)]:
        manifest.write_text(text)
        found = checkpoints.newest_verified(tmp_path)
        assert found.checkpoint is not None
        assert found.checkpoint.step == 1


@pytest.mark.fault(23)
def test_a_newer_format_is_refused_by_name(tmp_path):
    manifest = save(tmp_path, 1).folder / checkpoints.MANIFEST
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 3'))
    with pytest.raises(CheckpointError, match=r"format 3, and this ddpm-pipe reads up to 1"):
        checkpoints.newest_verified(tmp_path)


@pytest.mark.fault(19)
def test_a_writer_that_was_replaced_does_not_commit(tmp_path):
    with pytest.raises(CheckpointError, match="replaced"):
        checkpoints.save(tmp_path, 5, 1, tensors(5), {}, may_commit=lambda: False)
    assert checkpoints.newest_verified(tmp_path).checkpoint is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.promise("P5")
def test_pruning_keeps_the_newest_and_stops_where_the_newest_is_damaged(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / checkpoints.name_of(2, 0)).mkdir()  # remains of an older attempt
    checkpoints.prune(tmp_path, keep=2)
    assert [c.step for c in checkpoints.committed(tmp_path)] == [3, 2]
    assert not (tmp_path / checkpoints.name_of(2, 0)).exists()
    newest = save(tmp_path, 4)
    (newest.folder / "model.safetensors").write_bytes(b"")
    checkpoints.prune(tmp_path, keep=2)
    assert [c.step for c in checkpoints.committed(tmp_path)] == [4, 3, 2]


@pytest.mark.fault(6)
def test_a_place_without_room_is_refused_before_a_byte_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(StorageError, match="storage full: need"):
        save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_folder_should_be_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        save(tmp_path / "file" / "checkpoints", 1)


FULL_DISK = """
import resource, sys
from pathlib import Path
from pipeline.errors import StorageError
from tests.pipeline.training.test_checkpoint import save
root = Path(sys.argv[1])
save(root, 1)
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails with EFBIG, on the path that ENOSPC takes
resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
try:
    save(root, 2)
except StorageError as error:
    print("told:", error)
"""


@pytest.mark.fault(6)
@pytest.mark.promise("P5")
def test_a_write_that_fails_midway_leaves_the_older_checkpoint_alone(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("told: storage full")
    found = checkpoints.newest_verified(tmp_path)
    assert found.checkpoint is not None
    assert (found.checkpoint.step, found.warnings) == (1, [])
    assert len(list(tmp_path.iterdir())) == 1


WRITER = """
import sys
from pathlib import Path
from tests.pipeline.training.test_checkpoint import save
save(Path(sys.argv[1]), 2)
"""


# every system call by which a save reaches the disk: a folder, five files, their flushes, the folder's, the commit
SITES = [("mkdir", 1), *(("write", n) for n in range(1, 6)), *(("fsync", n) for n in range(1, 8)), ("rename", 1)]
COMMITTED = ("fsync", 7)  # of the folder, after the rename; the kill arrives as a call begins


@pytest.mark.fault(3)
@pytest.mark.promise("P5")
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace kills at the n-th system call")
def test_a_kill_at_any_system_call_of_a_save_leaves_a_checkpoint_that_verifies(tmp_path):
    for call, nth in SITES:
        root = tmp_path / f"{call}-{nth}"
        save(root, 1)
        folder = root / checkpoints.name_of(2, 1)
        names = [
            *(f"{g}.safetensors" for g in checkpoints.GROUPS),
            checkpoints.STATE,
            checkpoints.MANIFEST,
            checkpoints.MANIFEST + ".tmp",
        ]
        paths = [argument for path in (folder, *(folder / name for name in names)) for argument in ("-P", str(path))]
        kill = ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={nth}"]
        command = ["strace", "-f", "-qq", "-o", "/dev/null", *paths, *kill, sys.executable, "-c", WRITER, str(root)]
        done = subprocess.run(command, capture_output=True, check=False)
        assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), (call, nth, done)
        found = checkpoints.newest_verified(root)
        assert found.checkpoint is not None
        assert (found.checkpoint.step, found.warnings) == (2 if (call, nth) == COMMITTED else 1, []), (call, nth)
        assert save(root, 3).step == 3  # and the place can be written again
