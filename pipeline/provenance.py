"""Which code made a run: the commit, where the package is a checkout, and the versions of the libraries."""

from __future__ import annotations

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
    "torch-fidelity",
)


def code_version() -> str:
    """Return the package's version, with the commit (and `-dirty`) where it runs from a checkout: `0.1.0+1a2b3c...`."""
    commit = _git("rev-parse", "HEAD") if _git("ls-files", "--error-unmatch", "__init__.py") else ""
    if not commit:
        return pipeline.__version__
    dirty = "-dirty" if _git("status", "--porcelain", "--untracked-files=no", "--", "..") else ""
    return f"{pipeline.__version__}+{commit}{dirty}"


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide results."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str:
    """Return what git prints, run in the package's folder; "" where it fails or is not installed."""
    folder = Path(pipeline.__file__).parent
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=folder, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
