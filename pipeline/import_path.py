"""Where modules are imported from: the installed packages first, the user's folders (the current one, PYTHONPATH) after them.

A user's own network may be in any of them. A file there with the name of one of our modules or libraries, such as ray.py, replaces none of
these.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

LATE_FOLDERS = "DDPM_PIPE_LATE_FOLDERS"  # folders of PYTHONPATH that come last on the path of processes that Ray starts
LIBRARIES = frozenset(
    {
        *("ddpm", "pipeline", "PIL", "click", "fsspec", "grpc", "matplotlib", "mlflow", "numpy", "optuna", "pandas"),
        *("psutil", "pyarrow", "pydantic", "ray", "requests", "safetensors", "scipy", "sklearn", "sqlalchemy", "torch"),
        *("torchvision", "yaml"),
    }
)


def allow_modules_in(folder: str) -> None:
    """Let `package.module:Class` name a file in a folder (that of the command), or in those of LATE_FOLDERS."""
    for late in [folder, *filter(None, os.environ.get(LATE_FOLDERS, "").split(os.pathsep))]:
        if late not in sys.path:
            sys.path.append(late)


def replacing(files: Iterable[str]) -> list[str]:
    """Return the files, by name relative to their folder, that would replace a library if the folder came first on the path."""
    found = []
    for name in files:
        module = name.removesuffix("/__init__.py") if name.endswith("/__init__.py") else name.removesuffix(".py")
        if module != name and (module in LIBRARIES or module in sys.stdlib_module_names):
            found.append(name)
    return sorted(found)


def environment_for_ray() -> dict[str, str]:
    """Return PYTHONPATH without the folders that would replace a library, and LATE_FOLDERS with them, for processes that Ray starts."""
    folders = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    late = [folder for folder in folders if replacing(_top_files(folder))]
    if not late:
        return {}
    kept = [folder for folder in folders if folder not in late]
    return {"PYTHONPATH": os.pathsep.join(kept), LATE_FOLDERS: os.pathsep.join(late)}


def _top_files(folder: str) -> list[str]:
    """Return the modules of a folder for `replacing`; none if the folder cannot be read."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    packages = [f"{name}/__init__.py" for name in names if os.path.isfile(os.path.join(folder, name, "__init__.py"))]
    return packages + [name for name in names if name.endswith(".py")]
