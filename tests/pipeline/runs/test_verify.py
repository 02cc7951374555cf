"""`ddpm-pipe verify`: a replay has the bytes of the training, a corrupted checkpoint is found by name, and the run stays as it is."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.storage import checkpoint as checkpoints
from pipeline.storage.checkpoint import MANIFEST, Checkpoint
from pipeline.storage.checkpoint_store import CheckpointStore
from pipeline.storage.runs import Run
from tests.kit.commands import Typed
from tests.kit.object_store import objects


def content(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file below a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def corrupt(checkpoint: Checkpoint, group: str) -> str:
    """Flip the lowest bit of one weight as if before it was saved: what is on disk verifies. Return the tensor's name."""
    tensors = checkpoint.tensors()
    name = sorted(tensors[group])[3]
    flat = tensors[group][name].flatten().view(torch.int32)
    flat[0] ^= 1
    tensors[group][name] = flat.view(torch.float32).view_as(tensors[group][name])
    state = checkpoint.state()
    for path in checkpoint.folder.iterdir():
        path.unlink()
    checkpoints.save(
        checkpoint.folder.parent, checkpoint.step, checkpoint.attempt, tensors, state, may_commit=lambda: True
    )
    checkpoint.verify()
    return name


def test_a_replay_has_the_bytes_of_the_training_and_one_flipped_bit_is_named(trained: Run, typed: Typed) -> None:
    before = content(trained.folder)
    code, stdout, stderr = typed("verify", trained.id)
    newest, older = CheckpointStore(trained.checkpoints).committed()
    assert code == 0, stderr
    assert stdout == (
        f"run {trained.id}: the steps {older.step} to {newest.step} ended with the bytes of checkpoint {newest.folder.name}\n"
    )
    assert content(trained.folder) == before
    for group in ("ema", "optimizer"):
        name = corrupt(newest, group)
        code, stdout, stderr = typed("verify", trained.id, "--json")
        assert code == 12
        found = json.loads(stdout)
        assert (found["equal"], found["differences"][f"{group}.safetensors"]) == (False, name)
        assert (
            f"another ema.safetensors than checkpoint {newest.folder.name}: the first tensor that differs is" in stderr
        )
    assert content(trained.folder).keys() == before.keys()


def test_without_a_second_checkpoint_steps_are_replayed_twice(trained: Run, typed: Typed) -> None:
    newest, older = CheckpointStore(trained.checkpoints).committed()
    code, stdout, _ = typed("verify", trained.id, "--steps", "1", "--json")
    assert (code, json.loads(stdout)["compared_with"]) == (0, "a second replay")
    assert (json.loads(stdout)["from_step"], json.loads(stdout)["to_step"]) == (older.step, older.step + 1)
    code, _, stderr = typed("verify", trained.id, "--steps", "3")
    assert (code, "Give fewer" in stderr) == (2, True)
    (newest.folder / MANIFEST).unlink()
    code, _, stderr = typed("verify", trained.id)
    assert (code, f"got one checkpoint ({older.step}), expected two" in stderr) == (2, True)


def test_a_run_of_a_store_is_fetched_into_a_temporary_folder(trained: Run, typed: Typed, bucket: str) -> None:
    record = json.loads((trained.folder / "run.json").read_text())
    (trained.folder / "run.json").write_text(json.dumps(record | {"profile": record["profile"] | {"storage": bucket}}))
    run = Run(trained.folder)
    assert run.remote is not None
    run.remote.send_records(run.folder)
    stored = CheckpointStore(run.checkpoints, run.remote.folder.child("checkpoints"))
    for checkpoint in CheckpointStore(run.checkpoints).committed():
        stored.push(checkpoint, lambda: True)
    shutil.rmtree(run.checkpoints)
    before = objects(bucket)
    code, stdout, stderr = typed("verify", run.id, "--json")
    assert code == 0, stderr
    assert (json.loads(stdout)["equal"], objects(bucket), run.checkpoints.exists()) == (True, before, False)


def test_what_cannot_be_compared_is_refused(trained: Run, typed: Typed) -> None:
    newest, _ = CheckpointStore(trained.checkpoints).committed()
    whole = (newest.folder / "ema.safetensors").read_bytes()
    (newest.folder / "ema.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    code, _, stderr = typed("verify", trained.id)
    assert (code, "ema.safetensors is damaged" in stderr) == (4, True)
    (newest.folder / "ema.safetensors").write_bytes(whole)
    state, tensors = newest.state(), newest.tensors()
    for path in newest.folder.iterdir():
        path.unlink()
    made = replace(newest, attempt=newest.attempt)
    checkpoints.save(
        made.folder.parent, made.step, made.attempt, tensors, state | {"num_workers": 2}, may_commit=lambda: True
    )
    code, _, stderr = typed("verify", trained.id)
    assert (code, f"step {newest.step} was trained by 2 workers" in stderr) == (10, True)
