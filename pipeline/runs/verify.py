"""`ddpm-pipe verify`: repeat steps of a training from one of its checkpoints, and compare what they end with.

Training is a function of a checkpoint and of the steps, bit for bit. A replay that ends with other bytes than the checkpoint that was saved
there shows that one of the two went wrong without an error, such as by a bit that flipped in memory. The replay is a worker in this process
and in a temporary folder: nothing is written into the run.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.cluster_profile import Profile
from pipeline.config.context import Context
from pipeline.config.experiment import Experiment
from pipeline.console import Bar
from pipeline.data.order import default_num_streams
from pipeline.errors import CheckpointError, RefusedError, ReplayError, UsageError
from pipeline.runs.train_run import dataset_of
from pipeline.storage.checkpoint import STATE, Checkpoint
from pipeline.storage.checkpoint_store import CheckpointStore
from pipeline.storage.next_command import typeable
from pipeline.storage.run_checkpoints import RunCheckpoints
from pipeline.storage.runs import Run
from pipeline.tracking.tracker import TrackingSettings
from pipeline.training.device import release_memory
from pipeline.training.team import Team
from pipeline.training.trained import experiment_of, not_trained, profile_of
from pipeline.worker.job import Job
from pipeline.worker.worker import Worker


@dataclass(frozen=True)
class Verified:
    """A replay, and what it was compared with. `differences` names each file and its first tensor with other bytes."""

    run: str
    from_step: int
    to_step: int
    compared_with: str
    differences: dict[str, str] = field(default_factory=dict)
    torch: str = ""  # that wrote the checkpoint, if it is another one

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "run": self.run,
            "from_step": self.from_step,
            "to_step": self.to_step,
            "compared_with": self.compared_with,
            "equal": not self.differences,
            "differences": self.differences,
        }

    def require_equal(self) -> None:
        """Raise ReplayError if there are differences."""
        for file, tensor in self.differences.items():
            other = f" (written with torch {self.torch}, replayed with {torch.__version__})" if self.torch else ""
            raise ReplayError(
                f"run {self.run}: steps {self.from_step} to {self.to_step} ended with another {file} than {self.compared_with}: "
                f"the first tensor that differs is {tensor}{other}. Verify again, on another machine too, and check the memory of "
                "this one and of the one that trained."
            )


def verify_run(context: Context, reference: str, num_steps: int | None) -> Verified:
    """Replay a run's steps from its last checkpoint but one to its last.

    With `num_steps`, replay so many: to a checkpoint that is so much later, or twice.

    Raises:
        UsageError: the run has too few checkpoints, or too few steps.
        CheckpointError: a checkpoint is damaged.
        RefusedError: several workers trained it, whose bits one cannot repeat.
    """
    run = Run.find(context.home, reference, context.store, not_trained)
    experiment, profile = experiment_of(run), profile_of(run, context.named)
    first, last, end = _choose(run, experiment.training.steps, num_steps)
    with tempfile.TemporaryDirectory(prefix="ddpm-pipe-verify-") as folder:
        root = Path(folder)
        goal = None if last is None else _brought(run, last, root / "last")
        begin = _brought(run, first, root / "first")
        state = (goal or begin).state()
        if state["num_workers"] != 1:
            raise RefusedError(
                f"run {run.id}: step {(goal or begin).step} was trained by {state['num_workers']} workers, expected 1: "
                "a sum over workers has other bits on one. Nothing was compared."
            )
        replay = _Replay(context, run, experiment, profile, end, state["arithmetic"])
        found = replay.made(begin, root / "replay")
        words = f"checkpoint {goal.folder.name}" if goal is not None else "a second replay"
        differences = _differences(found, goal or replay.made(begin, root / "again"))
    other = "" if state["torch"] == torch.__version__ else str(state["torch"])
    return Verified(run.id, begin.step, end, words, differences, other)


def _choose(run: Run, total: int, num_steps: int | None) -> tuple[Checkpoint, Checkpoint | None, int]:
    """Return the checkpoint to start from, the one to compare with (None: a second replay), and the step to end at."""
    there = RunCheckpoints(run).committed()
    steps = ", ".join(str(checkpoint.step) for checkpoint in there) or "none"
    if num_steps is None:
        if len({checkpoint.step for checkpoint in there}) < 2:
            raise UsageError(
                f"run {run.id}: got one checkpoint ({steps}), expected two of different steps. Replay some steps twice: "
                f"{typeable(f'verify {run.id} --steps 10')}"
            )
        first = next(checkpoint for checkpoint in there if checkpoint.step < there[0].step)
        return first, there[0], there[0].step
    for first in there:
        for last in there:
            if last.step == first.step + num_steps:
                return first, last, last.step
    for first in there:
        if first.step + num_steps <= total:
            return first, None, first.step + num_steps
    raise UsageError(
        f"--steps: got {num_steps}, which is behind the last step, {total}, from each checkpoint of run {run.id} ({steps}). Give fewer."
    )


def _brought(run: Run, checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Return a checkpoint, verified: on this disk as it is, or fetched into a folder. Raises CheckpointError if it is damaged."""
    if run.remote is None:
        checkpoint.verify()
        return checkpoint
    copy = Checkpoint(folder / checkpoint.folder.name, checkpoint.step, checkpoint.attempt)
    return CheckpointStore(folder, run.remote.folder.child("checkpoints")).verified(copy)


class _Replay:
    """The training of a run, in a folder of its own, as far as step `end`, with the arithmetic that is recorded."""

    def __init__(
        self, context: Context, run: Run, experiment: Experiment, profile: Profile, end: int, arithmetic: dict[str, Any]
    ) -> None:
        self.console, self.run, self.end, self.arithmetic = context.console, run, end, arithmetic
        self.profile = profile.model_copy(update={"storage": None, "threads_per_worker": None})
        self.dataset = dataset_of(run, profile)
        # none of them decides the weights
        never = {"every_steps": None, "every_minutes": None, "keep_best": None, "milestones": ()}
        quiet = {
            "logging": experiment.logging.model_copy(update={"grid_every_steps": None}),
            "checkpoint": experiment.checkpoint.model_copy(update=never),
            "evaluation": experiment.evaluation.model_copy(update={"every_steps": None}),
        }
        self.experiment = experiment.model_copy(update=quiet)

    def made(self, begin: Checkpoint, home: Path) -> Checkpoint:
        """Train from a checkpoint to the end; return the checkpoint of that step, in the home given."""
        copy = Run(home / "runs" / self.run.id)
        (copy.checkpoints / begin.folder.name).mkdir(parents=True)
        for path in begin.folder.iterdir():  # links: they are only read
            (copy.checkpoints / begin.folder.name / path.name).symlink_to(path.absolute())
        copy.write_first(replace(self.run.record, profile=self.profile.to_dict(), trial=None))
        training = self.experiment.training
        job = Job(
            run_folder=str(copy.folder),
            dataset_folder=self.dataset.location,
            experiment=self.experiment.to_dict(),
            profile=self.profile.to_dict(),
            num_workers=1,
            num_streams=training.num_streams or default_num_streams(training.batch_size),
            attempt=copy.next_attempt(),
            code_folder=os.getcwd(),
            tracking=TrackingSettings(""),
        )
        bar = Bar(self.console, "replaying", self.end - begin.step, "steps")
        try:
            _Replayer(job, _Link(self.end - begin.step, bar), self.arithmetic).work()
        finally:
            bar.close()
            release_memory()
        (made,) = [found for found in CheckpointStore(copy.checkpoints).committed() if found.step == self.end]
        return made


class _Replayer(Worker):
    """A worker that repeats steps: it draws nothing, and nothing reaches MLflow."""

    def __init__(self, job: Job, link: _Link, recorded: dict[str, Any]) -> None:
        super().__init__(job, Team(), link)
        self.recorded = recorded

    def _begin_records(self, done: int) -> None:
        pass

    def _keep_arithmetic(self, state: dict[str, Any], step: int) -> None:
        """Take that of the checkpoint to compare with: a resume may have changed it since the one to start from."""
        super()._keep_arithmetic({**state, "arithmetic": self.recorded, "num_workers": 1}, step)

    def _close(self) -> None:
        assert self.saver is not None
        self.saver.close()


class _Link:
    """Asks for a stop, which saves, after so many steps."""

    def __init__(self, num_steps: int, bar: Bar) -> None:
        self._num_steps, self._bar, self._done = num_steps, bar, 0

    def publish(self, progress: dict[str, Any]) -> None:
        """Show the number of steps."""
        self._bar(self._done)

    def stop_requested(self) -> bool:
        """Return whether the step that was just made is the last. The worker calls this once a step."""
        self._done += 1
        return self._done >= self._num_steps


def _differences(found: Checkpoint, expected: Checkpoint) -> dict[str, str]:
    """Return the name of the first tensor with other bytes, by file."""
    ours, theirs = (checkpoint.manifest()["files"] for checkpoint in (found, expected))
    files = [name for name in ours.keys() | theirs.keys() if name != STATE]
    differing = sorted(name for name in files if ours.get(name) != theirs.get(name))
    return {name: _first_difference(found, expected, name.removesuffix(".safetensors")) for name in differing}


def _first_difference(found: Checkpoint, expected: Checkpoint, group: str) -> str:
    try:
        (ours,), (theirs,) = (checkpoint.tensors(group).values() for checkpoint in (found, expected))
    except CheckpointError as error:
        return str(error)
    for name in sorted(ours.keys() | theirs.keys()):
        if not _are_same_bits(ours.get(name), theirs.get(name)):
            return name
    return "none: the header of the file alone differs"


def _are_same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))
