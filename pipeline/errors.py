"""Errors a user can cause or must act on: one small tree, one exit code each.

    PipelineError            1  a fault of this program (never raised as such)
    ├── UsageError           2  wrong command line, configuration or unknown run
    ├── DataError            3  dataset missing, damaged, or not of the expected form
    ├── CheckpointError      4  no checkpoint that verifies, or one of another configuration
    ├── DivergedError        5  loss or gradient became NaN or infinite
    ├── StorageError         6  a folder cannot be written, or is full
    ├── TrackingError        7  the tracking server refuses, with strict tracking or where its answer is needed
    ├── ClusterError         8  cluster unavailable or too small, or training failed and is not retried
    ├── RunLockedError       9  another process holds the run
    ├── RefusedError        10  a comparison or a metric that would mislead, a removal of what is needed, or a red doctor
    ├── FailedTrialsError   11  a sweep ended, and some of its trials failed
    ├── ReplayError         12  a replay of training steps ended with other bytes
    └── InterruptedRunError 75  stopped by a signal with the state saved (130 for Ctrl-C, 143 if nothing was saved)

Every message is one line: what was got, what was expected, what to do. `pipeline.cli.main` alone turns an error into that line and an
exit code. Errors are pickled and sent between processes, so each is made from its message alone.
"""

from __future__ import annotations

from collections.abc import Iterable


class PipelineError(Exception):
    """Base of every error this package raises on purpose; `str(error)` is the line for the user."""

    exit_code = 1


class UsageError(PipelineError):
    """The command line, an experiment or profile file, or the name of a run is wrong."""

    exit_code = 2


class DataError(PipelineError):
    """A dataset is missing, damaged or not what was declared."""

    exit_code = 3


class CheckpointError(PipelineError):
    """No checkpoint verifies, or the requested one belongs to another configuration or format."""

    exit_code = 4


class DivergedError(PipelineError):
    """Training produced a loss or gradient that is not finite."""

    exit_code = 5


class StorageError(PipelineError):
    """A place cannot be written: it is read-only, full, or not a folder."""

    exit_code = 6


class TrackingError(PipelineError):
    """The tracking store cannot be used, and the user has asked to stop in that case, or nothing can be done without its answer."""

    exit_code = 7


class ClusterError(PipelineError):
    """The cluster is unavailable or too small, or training failed and is not retried."""

    exit_code = 8


class RunLockedError(PipelineError):
    """Another live process is working on the same run."""

    exit_code = 9


class RefusedError(PipelineError):
    """The result would mislead (unlike metrics, an unsuitable extractor), something depends on what is to be removed, or the doctor found
    something red.
    """

    exit_code = 10


class FailedTrialsError(PipelineError):
    """A sweep ended and reported, and some of its trials failed."""

    exit_code = 11


class ReplayError(PipelineError):
    """A replay of training steps ended with other bytes than the training did."""

    exit_code = 12


class InterruptedRunError(PipelineError):
    """A signal stopped the work; `exit_code` depends on the signal and on whether the state is saved."""

    exit_code = 75

    def __init__(self, message: str, exit_code: int = 75) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type[InterruptedRunError], tuple[str, int]]:
        return type(self), (str(self), self.exit_code)


def listing(names: Iterable[str]) -> str:
    """Return names separated by commas, at most 20 of them."""
    listed = list(names)
    return ", ".join(listed[:20]) + (", ..." if len(listed) > 20 else "")


def nearest(name: str, known: list[str]) -> str:
    """Return " (did you mean 'x'?)" for the known name closest to `name`, "" if none is close."""
    import difflib

    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""
