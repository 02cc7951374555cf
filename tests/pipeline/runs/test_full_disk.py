"""Faults 6 and 7: `ddpm-pipe train` on a disk that fills up, runs out of files or turns read-only under it, and is resumed with room."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.storage import checkpoint as checkpoints
from pipeline.storage.checkpoint_store import CheckpointStore
from pipeline.storage.runs import Run
from tests.hermetic import REPOSITORY
from tests.kit import trainer
from tests.kit.attempts import starts_of
from tests.kit.commands import PROGRAM, Started
from tests.kit.experiments import tiny_experiment, write_yaml
from tests.kit.small_disk import SmallDisk, small_disk
from tests.pipeline.runs.test_resume import to_the_end

# at its seventh step a process waits for a file: in between a test changes the disk
NETWORK = """
import time
from pathlib import Path
import torch
from torch import nn

class Gated(nn.Module):
    def __init__(self, gate: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 1, 1))
        self.drop, self.gate, self.calls = nn.Dropout(0.2), Path(gate), 0

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        while self.calls == 7 and not self.gate.exists():
            time.sleep(0.01)
        return self.drop(self.net(x))
"""


class Training:
    """A training on a small disk, and the gate that it waits at."""

    def __init__(self, disk: SmallDisk, folder: Path, environment: dict[str, str]) -> None:
        self.disk, self.folder, self.gate = disk, folder, folder / "gate"
        self.environment = environment | {"DDPM_PIPE_HOME": str(disk.folder)}
        self.sections = tiny_experiment() | {"model": {"type": "gated:Gated", "arguments": {"gate": str(self.gate)}}}
        (folder / "gated.py").write_text(NETWORK)
        write_yaml(folder / "gated.yaml", self.sections)
        (folder / "one.yaml").write_text("threads_per_worker: 1\n")

    def begin(self, *command: str) -> Started:
        self.gate.unlink(missing_ok=True)
        return self.disk.start(PROGRAM, *command, cwd=self.folder, env=self.environment)

    def until(self, step: int, *command: str) -> Started:
        """Begin, and wait until a step is saved: two steps later the process waits at the gate."""
        process = self.begin(*command)
        manifest = f"*/checkpoints/step-{step:010d}-*/{checkpoints.MANIFEST}"
        process.wait_for(lambda: list((self.disk.inside / "runs").glob(manifest)))
        return process

    def end(self, process: Started) -> tuple[int, str]:
        """Open the gate, and wait for the end; return the exit code and the command's one line about it."""
        self.gate.touch()
        code, _, stderr = process.end()
        assert "Traceback" not in stderr, stderr
        (line,) = [line for line in stderr.splitlines() if line.startswith("ddpm-pipe: ")]
        return code, line

    def run(self) -> Path:
        (run,) = (self.disk.inside / "runs").iterdir()
        return run

    def saved(self) -> list[int]:
        """The steps of the checkpoints on the disk, every byte verified."""
        found = CheckpointStore(self.run() / "checkpoints").committed()
        for checkpoint in found:
            checkpoint.verify()
        return [checkpoint.step for checkpoint in found]


@pytest.fixture
def training(tmp_path: Path, user_environment: dict[str, str]) -> Iterator[Training]:
    (tmp_path / "disk").mkdir()
    with small_disk(tmp_path / "disk", "size=24m") as disk:
        yield Training(disk, tmp_path, user_environment)


@pytest.mark.fault(6, 7)
@pytest.mark.promise("P1", "P5")
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_disk_that_is_full_or_read_only_ends_the_training_with_6_and_room_ends_it_with_the_same_bytes(training):
    disk = training.disk
    process = training.until(5, "train", "gated.yaml", "--cluster", "one.yaml")
    disk.fill()
    code, line = training.end(process)
    assert (code, "storage full: need" in line) == (6, True), line
    assert training.saved() == [5]
    assert training.end(training.begin("resume", "latest"))[0] == 6  # there is still no room

    disk.empty()
    process = training.until(10, "resume", "latest")
    disk.mount(f"remount,nr_inodes={disk.num_files() + 3}")  # the folder and two of a checkpoint's five files
    code, line = training.end(process)
    assert (code, "storage full: no inodes left" in line) == (6, True), line
    assert training.saved() == [10, 5]

    disk.mount("remount,nr_inodes=0")
    process = training.until(15, "resume", "latest")
    kept = training.run().relative_to(disk.inside) / "checkpoints"
    assert disk.run("mount", "--bind", disk.folder / kept, disk.folder / kept).code == 0
    disk.mount("remount,bind,ro", kept)
    code, line = training.end(process)
    assert (code, "cannot be written (Read-only file system)" in line) == (6, True), line
    assert training.saved() == [15, 10]
    disk.mount("remount,ro")
    for command in (["resume", "latest"], ["train", "gated.yaml"]):
        assert training.end(training.begin(*command))[0] == 6

    disk.mount("remount,rw")
    assert disk.run("umount", disk.folder / kept).code == 0
    training.gate.touch()
    done = disk.run(PROGRAM, "resume", "latest", cwd=training.folder, env=training.environment)
    assert done.code == 0, done.stderr
    assert starts_of((training.run() / "log.txt").read_text()) == [0, 5, 10, 15]
    assert json.loads((training.run() / "status.json").read_text())["status"] == "FINISHED"
    calm = trainer.make_run(training.folder, **training.sections)
    to_the_end(calm)
    assert trainer.final_digests(Run(training.run())) == trainer.final_digests(calm)


# every other command that writes, typed in one process that sees the disk
TYPED = """
import contextlib, io, json, sys

from tests.kit.commands import run_command

found = []
for words in json.loads(sys.argv[1]):
    stderr = io.StringIO()
    sys.argv[1:] = words
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        code = run_command(words)
    said = [line for line in stderr.getvalue().splitlines() if line.startswith("ddpm-pipe: ")]
    found.append((code, len(said), said[-1] if said else stderr.getvalue()))
print(json.dumps(found))
"""


@pytest.mark.fault(6, 7)
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("state", ["full", "read-only"])
def test_every_command_that_writes_says_in_one_line_that_the_disk_takes_nothing(
    trained: Run, tmp_path: Path, user_environment: dict[str, str], state: str
) -> None:
    (tmp_path / "disk").mkdir()
    writing = [
        ["sample", trained.id, "-n", "2"],
        ["sample", trained.id, "-n", "2", "--format", "png", "--out", "images"],
        ["sample", trained.id, "-n", "2", "--format", "parquet"],
        ["sample", trained.id, "-n", "2", "--format", "gif"],
        ["export", trained.id, "e1", "--format", "safetensors"],
        ["export", trained.id, "e2", "--format", "diffusers"],
        ["import", "exported"],
        ["ingest", "digits", "d2"],
        ["inspect", "d1"],
        ["schedule", "linear"],
        ["resume", trained.id, "-s", "training.steps=40"],
        ["train", "--data", "d1"],
        ["sweep"],
        ["init"],
    ]
    with small_disk(tmp_path / "disk", "size=32m") as disk:
        environment = user_environment | {"DDPM_PIPE_HOME": str(disk.folder), "PYTHONPATH": str(REPOSITORY)}

        def typed(*commands: list[str]) -> list[tuple[int, int, str]]:
            done = disk.run(sys.executable, "-c", TYPED, json.dumps(commands), cwd=disk.folder, env=environment)
            assert done.code == 0, done.stderr
            return [tuple(entry) for entry in json.loads(done.stdout.splitlines()[-1])]

        shutil.copytree(trained.home, disk.inside, dirs_exist_ok=True)
        room = typed(["ingest", "digits", "d1"], ["export", trained.id, "exported", "--format", "diffusers"])
        assert [code for code, _, _ in room] == [0, 0], room
        before = {path for path in disk.inside.rglob("*") if path.is_file()}
        if state == "full":
            disk.fill()
        else:
            disk.mount("remount,ro")
        for words, (code, lines, line) in zip(writing, typed(*writing), strict=True):
            assert (code, lines) == (6, 1), (words, line)
            assert "a file cannot be written" not in line, words  # it is named
        if state == "full":
            disk.empty()
        after = {path for path in disk.inside.rglob("*") if path.is_file()}
        assert before <= after
        assert {path.name for path in after - before} <= {"lock"}  # no part of a file
