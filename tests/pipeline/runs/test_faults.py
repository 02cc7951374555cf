"""Rows of the fault matrix that need no Ray: damaged shards, places that cannot be written, clocks that jump, losses that are no number."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.errors import DataError, DivergedError
from pipeline.storage.checkpoint_store import CheckpointStore
from pipeline.storage.runs import Run
from pipeline.training.team import Team
from pipeline.worker.job import Job
from pipeline.worker.worker import Worker
from tests.kit import trainer
from tests.kit.commands import PROGRAM
from tests.kit.forks import run_team


def shard_of(run: Run) -> Path:
    (shard,) = Path(run.record.dataset["path"]).glob("shard-*.parquet")
    return shard


@pytest.mark.fault(8)
@pytest.mark.parametrize("kept", [0, 0.5, -1], ids=["nothing", "half", "all but a byte"])
def test_a_cut_shard_ends_a_training_before_its_first_step(typed, home, trained, kept):
    shard = shard_of(trained)
    data = shard.read_bytes()
    shard.write_bytes(data[: int(len(data) * kept) if kept >= 0 else kept])
    before = sorted((home / "runs").iterdir())
    code, _, stderr = typed("train", "--data", str(shard.parent))
    assert code == 3, stderr
    assert f"{shard} is missing or damaged" in stderr
    assert stderr.count("\n") == 1
    assert sorted((home / "runs").iterdir()) == before


@pytest.mark.fault(9)
@pytest.mark.promise("P1", "P3")
def test_a_bit_flipped_under_a_training_ends_it_by_name_and_mended_it_ends_with_the_same_bytes(tmp_path):
    calm, struck = (trainer.make_run(tmp_path) for _ in range(2))
    assert trainer.train(str(calm.folder)) == "finished"
    assert trainer.train(str(struck.folder), stop_after=5) == "stopped"
    shard = shard_of(struck)
    sound = shard.read_bytes()
    shard.write_bytes(sound[:5000] + bytes([sound[5000] ^ 4]) + sound[5001:])
    with pytest.raises(DataError, match=rf"{shard} is damaged \(its sha256 differs") as caught:
        trainer.train(str(struck.folder))
    assert caught.value.exit_code == 3
    assert [checkpoint.step for checkpoint in CheckpointStore(struck.checkpoints).committed()] == [5, 4]
    shard.write_bytes(sound)
    assert trainer.train(str(struck.folder)) == "finished"
    assert trainer.final_digests(struck) == trainer.final_digests(calm)


@pytest.mark.fault(7)
def test_a_training_whose_home_is_read_only_ends_before_anything_is_made(shell):
    """In a mount namespace of its own: root may write wherever the file system lets it."""
    place = shell.home / "place"
    place.mkdir()
    alone = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*alone, "mount", "-t", "tmpfs", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    train = f"mount -t tmpfs -o ro tmpfs {place} && exec {PROGRAM} train"
    code, stdout, stderr = shell.launch(*alone, "sh", "-c", train, env={"DDPM_PIPE_HOME": str(place)}).end(120)
    assert (code, stdout) == (6, ""), stderr
    assert stderr.startswith(f"ddpm-pipe: {place}")
    assert "Read-only file system" in stderr
    assert stderr.count("\n") == 1


@pytest.mark.fault(18)
def test_a_clock_that_jumps_by_a_day_changes_no_byte_and_no_duration(tmp_path, monkeypatch):
    calm, struck = (trainer.make_run(tmp_path, training={"steps": 12, "batch_size": 16}) for _ in range(2))
    assert trainer.train(str(calm.folder)) == "finished"
    now, jumps = time.time, itertools.cycle([86_400, -86_400])
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    for stop_after in (5, None):  # a resume, too
        trainer.train(str(struck.folder), stop_after=stop_after)
    found = CheckpointStore(struck.checkpoints).newest_verified().checkpoint
    assert found is not None
    assert 0 < found.state()["elapsed_s"] < 3600
    events = [json.loads(line) for line in (struck.folder / "spool" / "events.jsonl").read_text().splitlines()]
    speed = "system/images_per_s"
    pace = [event["values"][speed] for event in events if speed in event.get("values", {})]
    assert len(pace) >= 4
    assert min(pace) > 0.1  # less, if a day had passed
    assert trainer.final_digests(struck) == trainer.final_digests(calm)


BREAKING = """
import torch
import torch.distributed as dist
from torch import nn

class Breaking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = nn.Conv2d(1, 1, 3, padding=1), 0

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        return self.net(x) * (float("nan") if self.calls == 7 and dist.get_rank() == 1 else 1.0)
"""


def diverge(rank: int, job: Job) -> None:
    """Be one of two workers; note at which step the training ended as diverged."""
    dist.init_process_group("gloo", init_method=f"file://{job.run_folder}/meet", rank=rank, world_size=2)
    try:
        Worker(job, Team.join(60), trainer.Alone()).work()
    except DivergedError as error:
        Path(job.run_folder, f"diverged-{rank}").write_text(str(error))
    dist.destroy_process_group()


@pytest.mark.fault(16)
def test_a_loss_that_is_no_number_on_one_worker_ends_all_at_its_step_and_no_checkpoint_holds_it(tmp_path):
    (tmp_path / "breaking.py").write_text(BREAKING)
    run = trainer.make_run(tmp_path, model={"type": "breaking:Breaking"})
    run_team(diverge, (replace(trainer.job_of(run), num_workers=2),), 2)
    said = [(run.folder / f"diverged-{rank}").read_text() for rank in range(2)]
    assert all("step 7" in line for line in said), said
    kept = CheckpointStore(run.checkpoints).committed()
    assert [checkpoint.step for checkpoint in kept] == [4]
    assert all(torch.isfinite(t).all() for group in kept[0].tensors().values() for t in group.values())
