"""The checkpoints of a run, wherever it lasts: in its folder, or in an object store with this machine's copies in the folder."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError
from pipeline.storage import checkpoint as checkpoints
from pipeline.storage.checkpoint import Checkpoint, Found, Tensors
from pipeline.storage.remote import RemoteFolder, is_remote
from pipeline.storage.remote_checkpoints import RemoteCheckpoints
from pipeline.storage.remote_run import own_folder
from pipeline.storage.runs import Run


class RunCheckpoints:
    """What a run has saved."""

    def __init__(self, run: Run) -> None:
        self._root = run.checkpoints
        self._remote = (
            None if run.remote is None else RemoteCheckpoints(run.remote.folder.child("checkpoints"), run.checkpoints)
        )

    def committed(self) -> list[Checkpoint]:
        """Return the committed checkpoints, newest first, without reading (or bringing) their files."""
        return checkpoints.committed(self._root) if self._remote is None else self._remote.committed()

    def newest_state(self) -> dict[str, Any]:
        """Return the JSON state of the newest committed checkpoint, without reading (or bringing) its tensors; {} before the first."""
        committed = self.committed()
        if not committed:
            return {}
        return committed[0].state() if self._remote is None else self._remote.state_of(committed[0])

    def newest_verified(self) -> Found:
        """Return the newest checkpoint every byte of which verifies, brought here; one of a newer format raises CheckpointError."""
        return checkpoints.newest_verified(self._root) if self._remote is None else self._remote.newest_verified()

    def verified(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return one of `committed`, brought here, every byte verified; CheckpointError where it is damaged."""
        if self._remote is not None:
            return self._remote.fetch(checkpoint)
        checkpoint.verify()
        return checkpoint

    def name_of(self, checkpoint: Checkpoint) -> str:
        """Return where a checkpoint lasts, as `checkpoint_at` takes it."""
        return str(checkpoint.folder) if self._remote is None else self._remote.uri_of(checkpoint)

    def commit(self, checkpoint: Checkpoint, may_commit: Callable[[], bool], keep: int) -> None:
        """Make a checkpoint that is committed on disk the run's newest, and remove all but the newest `keep`."""
        if self._remote is not None:
            self._remote.push(checkpoint, may_commit)
            self._remote.prune(keep)
        checkpoints.prune(self._root, keep)


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
    return RemoteCheckpoints(remote, local).fetch(Checkpoint(local / folder.name, checkpoint.step, checkpoint.attempt))


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
