"""Presets, sweeps and profiles by name: files of experiments/ and cluster/, found in a checkout and in an installed wheel alike.

A file of experiments/ whose name begins with `sweep-` is a sweep, every other one an experiment.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UsageError, nearest

WHAT = {"experiments": "preset", "sweeps": "sweep", "cluster": "profile"}
PACKAGE = Path(__file__).resolve().parent.parent


def folder_of(kind: str) -> Path:
    """Return the folder of the shipped files of a kind: inside the wheel, or beside the package in a checkout."""
    folder = "cluster" if kind == "cluster" else "experiments"
    shipped = PACKAGE / "shipped" / folder
    return shipped if shipped.is_dir() else PACKAGE.parent / folder


def names(kind: str) -> list[str]:
    """Return the names of the shipped files of one kind, sorted."""
    found = sorted(path.stem for path in folder_of(kind).glob("*.yaml"))
    return found if kind == "cluster" else [name for name in found if name.startswith("sweep-") == (kind == "sweeps")]


def about(kind: str, name: str) -> str:
    """Return the description of a shipped file: its first line."""
    with (folder_of(kind) / f"{name}.yaml").open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()


def find(kind: str, reference: str) -> Path:
    """Return the file that a path or a shipped name refers to.

    An existing file goes before a shipped name; without such a file, `cluster/gpu.yaml` is the shipped one. UsageError if it is neither.
    """
    path = Path(reference)
    if path.is_file():
        return path.resolve()
    known, shipped = names(kind), folder_of(kind)
    if reference in known:
        return shipped / f"{reference}.yaml"
    if path.suffix == ".yaml" and str(path.parent) == shipped.name and path.stem in known:
        return shipped / path.name  # as the docs write it, in a folder that is no checkout
    what = WHAT[kind]
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        raise UsageError(
            f"{reference}: no such file; give the path of a YAML file or a {what} name ({', '.join(known)})"
        )
    raise UsageError(f"unknown {what} {reference!r}{nearest(reference, known)}; known: {', '.join(known)}")
