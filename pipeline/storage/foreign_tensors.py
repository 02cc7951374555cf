"""Tensors from untrusted files: bounded in size, checked against the expected names and shapes, and loaded without running any code.

A file that holds anything else is refused with a ValueError. The only call of `torch.load` in this package is here.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as parse_safetensors
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
Rename = Callable[[Sequence[str]], dict[str, str]]

MAX_JSON_BYTES = 1 << 22  # a table of 100,000 betas fits
_MAX_HEADER_BYTES = 9 << 20  # for names and padding, beside the numbers themselves
_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of bounded size; ValueError if it holds anything else."""
    with path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} is larger than {MAX_JSON_BYTES} bytes")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON ({_first_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return content


def read_tensors(path: Path, expected: Shapes, rename: Rename | None = None) -> dict[str, Tensor]:
    """Return the tensors of a safetensors or torch file: exactly the expected ones, dense, floating-point and finite.

    Args:
        path: the suffix selects the format.
        expected: shape by name, after `rename`.
        rename: maps the names in the file to the current ones.
    """
    limit = 8 * sum(math.prod(shape) for shape in expected.values()) + _MAX_HEADER_BYTES
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path.name} has {size} bytes, more than the {limit} that this network can need")
    with path.open("rb") as file:
        data = file.read(size)  # not `limit`: Python reserves that memory at once
    state = (_from_safetensors if path.suffix == ".safetensors" else _from_torch)(data, path.name)
    names = rename(list(state)) if rename else {name: name for name in state}
    tensors = {names[name]: tensor.detach() for name, tensor in state.items()}
    _check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, len(state), path.name, expected)
    for name, tensor in tensors.items():
        if tensor.dtype not in _TYPES:
            raise ValueError(f"{path.name}: {name} is of type {tensor.dtype}, expected floating point")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{path.name}: {name} holds values that are not finite")
    return tensors


def load_torch(data: bytes) -> dict[str, Tensor]:
    """Read a torch file that holds a dictionary of dense tensors, without running code; ValueError for anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns before it refuses a file
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a torch file of tensors alone ({_first_line(error)})") from None
    if not isinstance(state, dict) or not all(
        isinstance(v, Tensor) and v.layout is torch.strided for v in state.values()
    ):
        raise ValueError("expected a dictionary of dense tensors, got something else")
    return state


def _from_safetensors(data: bytes, where: str) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = parse_safetensors(data)
    except Exception as error:  # an error class of its own, or a KeyError for an unknown type
        raise ValueError(f"{where}: not a safetensors file ({_first_line(error)})") from None
    return tensors


def _from_torch(data: bytes, where: str) -> dict[str, Tensor]:
    """Check sizes and checksums of the archive before torch reads it: torch itself checks no checksum."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError(f"{where}: holds compressed parts, which torch does not write")
            if sum(entry.file_size for entry in entries) > len(data):
                raise ValueError(f"{where}: its parts claim more bytes than it has")
            if (part := archive.testzip()) is not None:
                raise ValueError(f"{where}: {part} is damaged")
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{where}: not a torch file in the format of torch 1.6 and later ({_first_line(error)})"
        ) from None
    try:
        return {str(name): tensor for name, tensor in load_torch(data).items()}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_shapes(found: Shapes, count: int, where: str, expected: Shapes) -> None:
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(
            f"{where}: has no {missing[0]}" + (f" and lacks {len(missing) - 1} more" if missing[1:] else "")
        )
    if unknown := sorted(found.keys() - expected.keys()):
        raise ValueError(f"{where}: holds {unknown[0]}, which this network does not have")
    if len(found) != count:
        raise ValueError(f"{where}: holds a tensor under two names")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{where}: {name} has shape {found[name]}, expected {shape}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
