"""The context of a command: its profile, read once, and its console."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config.cluster_profile import Profile, load_profile
from pipeline.console import Console
from pipeline.import_path import allow_modules_in
from pipeline.redaction import CREDENTIALS
from pipeline.storage.home import absolute_store
from pipeline.storage.provenance import JOB_VARIABLE


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
    from_mlflow: bool = False  # started by `mlflow run`, in a folder and with a store of its choice
    console: Console = field(default_factory=Console)

    @classmethod
    def load(cls, cluster: str | None, command: Sequence[str] = ()) -> Context:
        """Read the profile; networks of the user's own may lie in the current folder. UsageError for a wrong profile."""
        allow_modules_in(os.getcwd())
        profile = load_profile(cluster)
        return cls(
            profile, None if cluster is None else profile, tuple(command), from_mlflow="MLFLOW_RUN_ID" in os.environ
        )

    @property
    def home(self) -> Path:
        """The folder that holds all state."""
        return self.profile.home()

    @property
    def store(self) -> str | None:
        """The profile's storage, which may be an object store."""
        return self.profile.storage

    def typed(self, words: str) -> str:
        """Return a command of ours that can be typed as it stands, and works where this one did: profile, home and tracking store."""
        cluster = cluster_in(self.command)
        at = f" --cluster {shlex.quote(cluster)}" if cluster else ""
        return f"{self._variables()}ddpm-pipe {words}{at}"

    def next_lines(self, commands: Mapping[str, str]) -> list[str]:
        """Return the lines that say what can be typed next: `commands` without program and profile, and what each is for."""
        lines = {self.typed(words): purpose for words, purpose in commands.items()}
        width = max(len(line) for line in lines)
        return ["next:", *(f"  {line:<{width}}  # {purpose}" for line, purpose in lines.items())]

    def _variables(self) -> str:
        """Return the assignments that go before a command; none for a job, whose folder is its own."""
        if JOB_VARIABLE in os.environ:
            return ""
        found = {}
        by_variable = self.store is None or "://" in self.store  # else the profile says which folder it is
        if by_variable and (self.from_mlflow or self.home.resolve() != Path.cwd()):
            found["DDPM_PIPE_HOME"] = str(self.home)
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        if self.from_mlflow and uri and not CREDENTIALS.search(uri):
            found["MLFLOW_TRACKING_URI"] = absolute_store(uri)
        return "".join(f"{name}={shlex.quote(value)} " for name, value in found.items())


def cluster_in(command: Sequence[str]) -> str | None:
    """Return the profile that a command line names, None if it names none."""
    for word, following in zip(command, [*command[1:], ""], strict=False):
        option, _, value = word.partition("=")
        if option == "--cluster":
            return value or following
    return None
