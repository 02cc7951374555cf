"""The checkpoints of a run, wherever it lasts: in its folder, or in an object store with this machine's copies in the folder."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError
from pipeline.storage import checkpoint as checkpoints
from pipeline.storage.checkpoint import Checkpoint, Tensors
from pipeline.storage.checkpoint_store import CheckpointStore
from pipeline.storage.remote import RemoteFolder, is_remote
from pipeline.storage.remote_run import own_folder
from pipeline.storage.runs import Run


class RunCheckpoints(CheckpointStore):
    """What a run has saved."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.checkpoints, None if run.remote is None else run.remote.folder.child("checkpoints"))


def checkpoint_at(place: str) -> Checkpoint:
    """Return the checkpoint that lasts at a path or address, verified, and brought here where it is far away.

    Raises:
        CheckpointError: it is gone or damaged.
    """
    folder = Path(place.partition("?")[0])
    name = checkpoints.NAME.fullmatch(folder.name)
    assert name is not None
    checkpoint = Checkpoint(folder, int(name[1]), int(name[2]))
    if not is_remote(place):
        checkpoint.verify()
        return checkpoint
    root, _, query = place.partition("?")
    remote = RemoteFolder(root.rpartition("/")[0] + (f"?{query}" if query else ""))
    local = own_folder("origins") / remote.prefix.replace("/", "-")
    return CheckpointStore(local, remote).verified(Checkpoint(local / folder.name, checkpoint.step, checkpoint.attempt))


class Saver:
    """Saves the checkpoints of one attempt: on disk at once, and from there to an object store behind the back of training.

    One is on its way at a time. A checkpoint counts (older ones are removed, the run's step goes up) once it is committed where the
    run lasts.
    """

    def __init__(self, run: Run, attempt: int, keep: int) -> None:
        self._run, self._attempt, self._keep = run, attempt, keep
        self._checkpoints = RunCheckpoints(run)
        self._sending: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, step: int, tensors: Tensors, state: dict[str, Any], *, wait: bool) -> None:
        """Save a step, and wait until it is committed where the run lasts if `wait`.

        StorageError where that failed, or, unless `wait`, where the step before it failed on its way: this one is tried then too.
        CheckpointError where a later attempt has replaced this one.
        """
        late = self._finished()
        if late is not None and not isinstance(late, StorageError):
            raise late
        checkpoint = checkpoints.save(
            self._run.checkpoints, step, self._attempt, tensors, state, may_commit=self._may_commit
        )
        if self._run.remote is None:
            self._commit(checkpoint)
            return
        self._sending = threading.Thread(target=self._send, args=(checkpoint,), name="upload", daemon=True)
        self._sending.start()
        failure = self._finished() if wait else late
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Wait for what is on its way; whether it arrived is told by what the store has."""
        self._finished()

    def _finished(self) -> BaseException | None:
        """Wait for the checkpoint on its way, and return why it did not arrive."""
        if self._sending is not None:
            self._sending.join()
        self._sending, failure, self._failure = None, self._failure, None
        return failure

    def _send(self, checkpoint: Checkpoint) -> None:
        try:
            self._commit(checkpoint)
            self._run.send_files()
        except BaseException as error:  # raised where training next asks
            self._failure = error

    def _commit(self, checkpoint: Checkpoint) -> None:
        self._checkpoints.commit(checkpoint, self._may_commit, self._keep)
        self._run.update(step=checkpoint.step)

    def _may_commit(self) -> bool:
        return self._run.current_attempt() == self._attempt
