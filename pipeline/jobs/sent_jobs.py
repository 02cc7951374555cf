"""What the jobs of Ray and of Slurm have in common: they are listed, found, followed and stopped by the same commands."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from pipeline.config.cluster_profile import Profile
from pipeline.console import Console
from pipeline.errors import UsageError, nearest
from pipeline.storage.next_command import typeable

PREFIX = "ddpm-"
AFTER_STOP_S = 20.0  # after saving, to close tracking and disconnect from Ray


class SentJobs(ABC):
    """The jobs of a profile's cluster, which is at `place`."""

    def __init__(self, profile: Profile, console: Console, place: str) -> None:
        self._profile, self._console, self._place = profile, console, place

    @abstractmethod
    def listed(self) -> list[dict[str, Any]]:
        """Return this package's jobs, newest first: id, status, start, duration, command."""

    @abstractmethod
    def follow(self, job: str, out: Callable[[str], None], log: Callable[[str], None]) -> int:
        """Print a job's log from its beginning until it ends, results to `out` and the rest to `log`; return its exit code."""

    @abstractmethod
    def stop(self, job: str) -> str:
        """Ask a job to stop, wait until it has (training saves first), and return a line about it."""

    def find(self, reference: str) -> str:
        """Return the job id for an id, a unique prefix (with or without `ddpm-`), or `latest`; UsageError otherwise."""
        ids = [row["job"] for row in self.listed()]
        if reference == "latest" and ids:
            return str(ids[0])
        found = [job for job in ids if reference in (job, job.removeprefix(PREFIX))] or [
            job for job in ids if job.startswith(reference) or job.removeprefix(PREFIX).startswith(reference)
        ]
        if len(found) == 1:
            return str(found[0])
        if found:
            raise UsageError(f"job {reference!r} is ambiguous: it fits {', '.join(found)}; give more characters")
        known = f"there are {', '.join(ids[:5])}" if ids else "there are none"
        raise UsageError(f"job {reference!r}: no such job on {self._place}{nearest(reference, ids)}; {known}")

    def detach_hint(self, job: str) -> str:
        """Return the lines for a user who stops following the job."""
        stop = typeable(f"jobs stop {job}")
        return f"no longer following: {job} goes on\nfollow again: {self._how_to_follow(job)}\nstop it:      {stop}"

    def _how_to_follow(self, job: str) -> str:
        return typeable(f"jobs follow {job}")
