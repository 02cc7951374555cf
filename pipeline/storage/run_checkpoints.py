"""The checkpoints of a run: in its folder, or in an object store with this machine's copies in the folder."""

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
from pipeline.storage.retention import Retention
from pipeline.storage.runs import Run


class RunCheckpoints(CheckpointStore):
    """The checkpoints of a run."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.checkpoints, None if run.remote is None else run.remote.folder.child("checkpoints"))


def checkpoint_at(place: str) -> Checkpoint:
    """Return the checkpoint at a path or address, verified; one in an object store is fetched.

    Raises:
        CheckpointError: it was removed or is damaged.
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
    """Saves the checkpoints of one attempt: on disk at once, and from there to an object store in a thread, while training continues.

    One checkpoint is sent at a time. Older ones are removed, and the run's step goes up, once it is committed on disk or in the store.
    """

    def __init__(self, run: Run, attempt: int, retention: Retention) -> None:
        self._run, self._attempt, self._retention = run, attempt, retention
        self._checkpoints = RunCheckpoints(run)
        self._sending: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, step: int, tensors: Tensors, state: dict[str, Any], *, wait: bool) -> None:
        """Save a step. With `wait`, return once it is committed in the store, too.

        Raises:
            StorageError: saving failed; without `wait` also if sending the checkpoint before this one failed. This one is sent anyway.
            CheckpointError: a later attempt has replaced this one.
        """
        late = self._finished()
        if late is not None and not isinstance(late, StorageError):
            raise late
        checkpoint = checkpoints.save(
            self._run.checkpoints, step, self._attempt, tensors, state, may_commit=self.may_commit
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
        """Wait for the checkpoint that is being sent; a failure is not raised."""
        self._finished()

    def _finished(self) -> BaseException | None:
        """Wait for the checkpoint that is being sent, and return the error that stopped it."""
        if self._sending is not None:
            self._sending.join()
        self._sending, failure, self._failure = None, self._failure, None
        return failure

    def _send(self, checkpoint: Checkpoint) -> None:
        try:
            self._run.send_files()  # first, since the scores among them decide which checkpoints the commit removes
            self._commit(checkpoint)
        except BaseException as error:  # raised by the next `save`
            self._failure = error

    def remove_others(self) -> None:
        """Remove checkpoints that the scores since the last save leave behind, once training is over."""
        if self._retention.best and self.may_commit():
            self._checkpoints.prune(self._retention.newest, self._pinned())

    def _commit(self, checkpoint: Checkpoint) -> None:
        self._checkpoints.commit(checkpoint, self.may_commit, self._retention.newest, self._pinned())
        self._run.update(step=checkpoint.step)

    def _pinned(self) -> set[str]:
        return self._retention.pinned(self._run.folder, self._attempt)

    def may_commit(self) -> bool:
        """Whether this attempt is still the newest, which alone may write."""
        return self._run.current_attempt() == self._attempt
