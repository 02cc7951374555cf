"""Commands that a message proposes, as they can be typed: with the profile and the places that this process was given."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.redaction import CREDENTIALS
from pipeline.storage.home import absolute_store, home
from pipeline.storage.provenance import JOB_VARIABLE


def typeable(words: str) -> str:
    """Return the command `ddpm-pipe WORDS`, which takes `--cluster`, so that it works where this process does."""
    cluster = cluster_in(sys.argv)
    at = f" --cluster {shlex.quote(cluster)}" if cluster else ""
    return f"{_variables()}ddpm-pipe {words}{at}"


def _variables() -> str:
    """Return the assignments that go before a command; none for a job, whose folder is its own."""
    if JOB_VARIABLE in os.environ:
        return ""
    found = {}
    by_mlflow = "MLFLOW_EXPERIMENT_ID" in os.environ  # `mlflow run` chose folder and store
    if by_mlflow or ("DDPM_PIPE_HOME" in os.environ and home().resolve() != Path.cwd()):
        found["DDPM_PIPE_HOME"] = str(home())
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if by_mlflow and uri and not CREDENTIALS.search(uri):
        found["MLFLOW_TRACKING_URI"] = absolute_store(uri)
    return "".join(f"{name}={shlex.quote(value)} " for name, value in found.items())


def cluster_in(command: Sequence[str]) -> str | None:
    """Return the profile that a command line names, None if it names none."""
    for word, following in zip(command, [*command[1:], ""], strict=False):
        option, _, value = word.partition("=")
        if option == "--cluster":
            return value or following
    return None
