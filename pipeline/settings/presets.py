"""Presets and profiles by name: files of experiments/ and cluster/, found in a checkout and in an installed wheel alike."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UsageError, nearest

PACKAGE = Path(__file__).resolve().parent.parent


def folder_of(kind: str) -> Path:
    """Return the folder of the shipped `experiments` or `cluster` files: inside the wheel, or beside the package in a checkout."""
    shipped = PACKAGE / "shipped" / kind
    return shipped if shipped.is_dir() else PACKAGE.parent / kind


def names(kind: str) -> list[str]:
    """Return the names of the shipped files of one kind, sorted."""
    return sorted(path.stem for path in folder_of(kind).glob("*.yaml"))


def find(kind: str, reference: str) -> Path:
    """Return the file that a path or a shipped name refers to.

    Raises UsageError when it is neither; a name that is both a shipped one and an existing file is the file.
    """
    path = Path(reference)
    if path.is_file():
        return path.resolve()
    shipped = folder_of(kind) / f"{reference}.yaml"
    if path.name == reference and shipped.is_file():
        return shipped
    what = "preset" if kind == "experiments" else "profile"
    known = names(kind)
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        raise UsageError(
            f"{reference}: no such file; give the path of a YAML file or a {what} name ({', '.join(known)})"
        )
    raise UsageError(f"unknown {what} {reference!r}{nearest(reference, known)}; known: {', '.join(known)}")
