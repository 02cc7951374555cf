"""Which code made a run: the commit, if the package is a checkout, and the versions of the libraries."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pipeline

LIBRARIES = (
    "torch",
    "torchvision",
    "ray",
    "mlflow",
    "pyarrow",
    "numpy",
    "pillow",
    "safetensors",
    "scikit-learn",
)


# A submitted job's code has no git checkout: the sender passes what is known of its own.
JOB_VARIABLE = "DDPM_PIPE_JOB"  # the id of a submitted job, whose driver runs on a node of the cluster
CODE_VERSION_VARIABLE = "DDPM_PIPE_CODE_VERSION"
LOCK_HASH_VARIABLE = "DDPM_PIPE_LOCK_HASH"


def code_version() -> str:
    """Return the package's version, with the commit (and `-dirty`) if it is a checkout: `0.1.0+1a2b3c...`."""
    if sent := os.environ.get(CODE_VERSION_VARIABLE):
        return sent
    commit = _git("rev-parse", "HEAD") if _git("ls-files", "--error-unmatch", "__init__.py") else ""
    if not commit:
        return pipeline.__version__
    dirty = "-dirty" if _git("status", "--porcelain", "--untracked-files=no", "--", "..") else ""
    return f"{pipeline.__version__}+{commit}{dirty}"


def lock_hash() -> str:
    """Return the SHA-256 of the lock file from which a checkout's environment is made; "" without one."""
    sent = os.environ.get(LOCK_HASH_VARIABLE)
    lock = Path(pipeline.__file__).resolve().parent.parent / "requirements.lock"
    if sent is not None or not lock.is_file():
        return sent or ""
    return hashlib.sha256(lock.read_bytes()).hexdigest()


def of_submission() -> dict[str, str]:
    """Return the lock file's hash and the job's id for a run's record, as far as there are any."""
    known = {"lock_hash": lock_hash(), "job": os.environ.get(JOB_VARIABLE) or os.environ.get("SLURM_JOB_ID", "")}
    return {name: value for name, value in known.items() if value}


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that determine results."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str:
    """Return git's output for the package's folder; "" if git fails or is not installed."""
    folder = Path(pipeline.__file__).parent
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=folder, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
