"""Checkpoints that are either complete or invisible: safetensors and JSON in a folder whose manifest is written last.

    checkpoints/step-0000001000-1/       step, and the attempt that wrote it: never overwritten
        model.safetensors ema.safetensors optimizer.safetensors     one for each group; further ones as the experiment asks
        state.json                       the rest of what training needs, and what identifies the run
        MANIFEST.json                    sizes and SHA-256 of the others; its presence is the commit

Every file is written through our own handle, flushed to the disk and hashed. The manifest follows: it is written under a temporary name,
flushed and renamed, and the folder is flushed. A kill at any moment leaves a folder without a manifest, which readers ignore. Readers check
sizes and hashes before they parse a byte, so that a damaged checkpoint is skipped and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from pipeline.errors import CheckpointError, StorageError
from pipeline.storage.durable import flush_folder, storage_errors, write_flushed

FORMAT = 1
MANIFEST = "MANIFEST.json"
STATE = "state.json"
GROUPS = ("model", "ema", "optimizer")
NAME = re.compile(r"step-(\d{10})-(\d+)")
ROOM = 2.2  # free space that must be there before a checkpoint is written, in sizes of a checkpoint

Tensors = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint on disk."""

    folder: Path
    step: int
    attempt: int

    def state(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / STATE).read_bytes())
        return content

    def tensors(self, *groups: str) -> Tensors:
        """Return the named groups of tensors (all by default), on the CPU. Raises CheckpointError if a file is not the committed one."""
        manifest = self.manifest()
        return {
            group: parse_safetensors(_verified(self.folder, f"{group}.safetensors", manifest))
            for group in groups or self.groups()
        }

    def groups(self) -> list[str]:
        """Return the names of the groups of tensors."""
        return [name.removesuffix(".safetensors") for name in self.manifest()["files"] if name != STATE]

    def manifest(self) -> dict[str, Any]:
        """Return the manifest: `files` has "bytes" and "sha256" of each file by name. Raises CheckpointError if it cannot be read."""
        try:
            content = (self.folder / MANIFEST).read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {self.folder.name}: its manifest cannot be read ({type(error).__name__})"
            ) from None
        return parse_manifest(content, self.folder)

    def verify(self, manifest: dict[str, Any] | None = None) -> None:
        """Compare every file with the manifest, or with one that is not in the folder yet. CheckpointError names the first that differs."""
        manifest = manifest or self.manifest()
        for name in manifest["files"]:
            _verified(self.folder, name, manifest)

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(entry["bytes"] for entry in self.manifest()["files"].values())


@dataclass
class Found:
    """The newest checkpoint that verifies, and a warning for each damaged one that was skipped before it."""

    checkpoint: Checkpoint | None
    warnings: list[str] = field(default_factory=list)


def name_of(step: int, attempt: int) -> str:
    """Return the folder name of a checkpoint. Names sort by step, then by attempt."""
    return f"step-{step:010d}-{attempt}"


def save(
    root: Path, step: int, attempt: int, tensors: Tensors, state: dict[str, Any], *, may_commit: Callable[[], bool]
) -> Checkpoint:
    """Write and commit one checkpoint.

    `may_commit` is called just before the commit: a writer that a later attempt has replaced must not commit any more.

    Raises:
        CheckpointError: `may_commit` returned False.
        StorageError: the place is full or read-only. Older checkpoints are untouched.
    """
    folder = root / name_of(step, attempt)
    with storage_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        _require_room(root, tensors)
        if folder.exists():  # either committed, and never written twice, or left by a write that was killed
            if (folder / MANIFEST).exists():
                return Checkpoint(folder, step, attempt)
            shutil.rmtree(folder)
        folder.mkdir()
        try:
            with storage_errors(root):  # measures the free space before the unfinished files are removed
                _write_all(folder, step, attempt, tensors, state, may_commit)
                flush_folder(root)
        except BaseException:
            if not (folder / MANIFEST).exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise
    return Checkpoint(folder, step, attempt)


def num_bytes(tensors: Tensors) -> int:
    return sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())


class NewerFormatError(CheckpointError):
    """The checkpoint was written by a later version of this package."""


def parse_manifest(content: bytes, folder: Path) -> dict[str, Any]:
    """Return the manifest of the checkpoint in a folder. Raises CheckpointError if it is not a manifest of this format."""
    try:
        manifest: dict[str, Any] = json.loads(content)
        version = manifest["format"]
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {folder.name}: its manifest cannot be read ({type(error).__name__})"
        ) from None
    if version > FORMAT:
        raise NewerFormatError(
            f"checkpoint {folder} was written in format {version}, and this ddpm-pipe reads up to {FORMAT}; install the newer release"
        )
    if not {f"{group}.safetensors" for group in manifest.get("groups", GROUPS)} | {STATE} <= entries.keys():
        raise CheckpointError(f"checkpoint {folder.name}: its manifest does not name all files")
    if any(Path(name).name != name or name == MANIFEST for name in entries):
        raise CheckpointError(f"checkpoint {folder.name}: its manifest names a file outside it")
    return manifest


def _verified(folder: Path, name: str, manifest: dict[str, Any]) -> bytes:
    """Return the bytes of one file. Raises CheckpointError unless they are the committed ones."""
    entry = manifest["files"].get(name)
    if entry is None:
        raise CheckpointError(f"checkpoint {folder.name}: holds no {name}")
    try:
        size = (folder / name).stat().st_size
        data = (folder / name).read_bytes() if size == entry["bytes"] else b""
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder.name}: {name} cannot be read ({error.strerror})") from None
    if size != entry["bytes"]:
        raise CheckpointError(f"checkpoint {folder.name}: {name} has {size} bytes, {entry['bytes']} were committed")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise CheckpointError(f"checkpoint {folder.name}: {name} is damaged (its SHA-256 is not the committed one)")
    return data


def _serialised(group: dict[str, Tensor]) -> bytes:
    data: bytes = to_safetensors({name: tensor.detach().cpu().contiguous() for name, tensor in group.items()})
    return data


def _write_all(
    folder: Path, step: int, attempt: int, tensors: Tensors, state: dict[str, Any], may_commit: Callable[[], bool]
) -> None:
    """Write the files of a checkpoint into its folder, and commit it by its manifest if that is still allowed."""
    files = {
        f"{group}.safetensors": _write(folder / f"{group}.safetensors", _serialised(tensors[group]))
        for group in tensors
    }
    files[STATE] = _write(folder / STATE, json.dumps(state).encode())
    flush_folder(folder)
    if not may_commit():
        raise CheckpointError(
            f"attempt {attempt} was replaced by a later one while it saved step {step}; nothing was committed"
        )
    manifest = {"format": FORMAT, "step": step, "attempt": attempt, "groups": sorted(tensors), "files": files}
    temporary = folder / (MANIFEST + ".tmp")
    write_flushed(temporary, json.dumps(manifest, indent=1).encode())
    temporary.rename(folder / MANIFEST)
    flush_folder(folder)


def _write(path: Path, data: bytes) -> dict[str, Any]:
    """Write one file, and return its entry for the manifest."""
    write_flushed(path, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _require_room(root: Path, tensors: Tensors) -> None:
    need, have = int(num_bytes(tensors) * ROOM), shutil.disk_usage(root).free
    if have < need:
        raise StorageError(
            f"storage full: need {need / 1e6:.1f} MB for a checkpoint, have {have / 1e6:.1f} MB at {root}; free some space"
        )
