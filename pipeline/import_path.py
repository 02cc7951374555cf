"""Where modules are imported from: the installed packages first, the user's folders (the current one, PYTHONPATH) after them.

A network of the user's own may lie in any of them; a file there that is called like one of our modules or libraries, such as ray.py,
replaces none of these.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

LATE_FOLDERS = "DDPM_PIPE_LATE_FOLDERS"  # of PYTHONPATH, for processes that Ray starts: they come last on their path
LIBRARIES = frozenset(
    {
        *("ddpm", "pipeline", "PIL", "click", "fsspec", "grpc", "matplotlib", "mlflow", "numpy", "optuna", "pandas"),
        *("psutil", "pyarrow", "pydantic", "ray", "requests", "safetensors", "scipy", "sklearn", "sqlalchemy", "torch"),
        *("torchvision", "yaml"),
    }
)


def allow_modules_in(folder: str) -> None:
    """Let `package.module:Class` name a file in a folder (the one the command was typed in), or in those of LATE_FOLDERS."""
    for late in [folder, *filter(None, os.environ.get(LATE_FOLDERS, "").split(os.pathsep))]:
        if late not in sys.path:
            sys.path.append(late)


def replacing(files: Iterable[str]) -> list[str]:
    """Return those of a folder's files, by name relative to it, that would replace a library if the folder came first on the path."""
    found = []
    for name in files:
        module = name.removesuffix("/__init__.py") if name.endswith("/__init__.py") else name.removesuffix(".py")
        if module != name and (module in LIBRARIES or module in sys.stdlib_module_names):
            found.append(name)
    return sorted(found)


def environment_for_ray() -> dict[str, str]:
    """Return PYTHONPATH without the folders that would replace a library in Ray's processes, which get those as LATE_FOLDERS."""
    folders = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    late = [folder for folder in folders if replacing(_top_files(folder))]
    if not late:
        return {}
    kept = [folder for folder in folders if folder not in late]
    return {"PYTHONPATH": os.pathsep.join(kept), LATE_FOLDERS: os.pathsep.join(late)}


def _top_files(folder: str) -> list[str]:
    """Return the modules of a folder, as `replacing` takes them; none for a folder that cannot be read."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    packages = [f"{name}/__init__.py" for name in names if os.path.isfile(os.path.join(folder, name, "__init__.py"))]
    return packages + [name for name in names if name.endswith(".py")]
