"""The context of a command: its profile, read once, and its console."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config.cluster_profile import Profile, load_profile
from pipeline.console import Console
from pipeline.import_path import allow_modules_in


@dataclass(frozen=True)
class Context:
    """Profile, home and console of a command.

    Attributes:
        profile: the one that `--cluster` names, by default `local`.
        named: the same, or None without `--cluster`: then a run or a sweep keeps the profile that it was started with.
        command: as typed; it is recorded with what the command makes.
    """

    profile: Profile
    named: Profile | None = None
    command: tuple[str, ...] = ()
    console: Console = field(default_factory=Console)

    @classmethod
    def load(cls, cluster: str | None, command: Sequence[str] = ()) -> Context:
        """Read the profile; networks of the user's own may lie in the current folder. UsageError for a wrong profile."""
        allow_modules_in(os.getcwd())
        profile = load_profile(cluster)
        return cls(profile, None if cluster is None else profile, tuple(command))

    @property
    def home(self) -> Path:
        """The folder that holds all state."""
        return self.profile.home()

    @property
    def store(self) -> str | None:
        """The profile's storage, which may be an object store."""
        return self.profile.storage
