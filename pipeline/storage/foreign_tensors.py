"""Tensors from files of strangers: looked at before they are loaded, bounded in size, and running nothing.

What a file may hold is known before it is opened: names and shapes. A file that holds anything else is refused with a ValueError. The one
call of `torch.load` in this package is here.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load as parse_safetensors
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
Rename = Callable[[Sequence[str]], dict[str, str]]

MAX_JSON_BYTES = 1 << 22  # a table of 100,000 betas fits
_MAX_HEADER_BYTES = 1 << 23
_SLACK_BYTES = 1 << 20  # names and padding, beside the numbers themselves
_SAFETENSORS_TYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_TORCH_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# all that a file of dense tensors needs to be unpickled
_HARMLESS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16")),
}


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file of bounded size holds; ValueError where it is anything else."""
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
    """Return the tensors of a safetensors or torch file, which are those expected: dense, of floating point and finite.

    Args:
        path: its suffix says which of the two it is.
        expected: shape by name, after `rename`.
        rename: gives the names of today for those in the file.
    """
    limit = 8 * sum(math.prod(shape) for shape in expected.values()) + _SLACK_BYTES + _MAX_HEADER_BYTES
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path.name} has {size} bytes, more than the {limit} that this network can need")
    with path.open("rb") as file:
        data = file.read(size)  # not `limit`: room for that is taken at once, and a large network's may not be there
    load = _from_safetensors if path.suffix == ".safetensors" else _from_torch
    tensors = load(data, path.name, expected, rename or (lambda names: {name: name for name in names}))
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{path.name}: {name} holds values that are not finite")
    return tensors


def load_torch(data: bytes) -> dict[str, Tensor]:
    """Read a torch file as a dictionary of dense tensors, running nothing that it may hold; ValueError for anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of odd files before it refuses them
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a torch file of tensors alone ({_first_line(error)})") from None
    if not isinstance(state, dict) or not all(
        isinstance(v, Tensor) and v.layout is torch.strided for v in state.values()
    ):
        raise ValueError("expected a dictionary of dense tensors, got something else")
    return state


def _from_safetensors(data: bytes, where: str, expected: Shapes, rename: Rename) -> dict[str, Tensor]:
    """Look at the header ourselves first: 8 bytes of its length (little endian), then JSON."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(_MAX_HEADER_BYTES, len(data) - 8):
        raise ValueError(f"{where}: its header claims {length} bytes, which it cannot have")
    try:
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        shapes = {str(name): tuple(entry["shape"]) for name, entry in header.items()}
        kinds = {str(name): str(entry["dtype"]) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{where}: its header is not that of a safetensors file ({_first_line(error)})") from None
    names = rename(list(shapes))
    _check_shapes({names[name]: shape for name, shape in shapes.items()}, len(shapes), where, expected)
    for name, kind in kinds.items():
        if kind not in _SAFETENSORS_TYPES:
            raise ValueError(f"{where}: {name} is of type {kind}, expected one of {', '.join(_SAFETENSORS_TYPES)}")
    try:
        tensors = parse_safetensors(data)
    except Exception as error:  # its own kind of error, and others for offsets that overlap
        raise ValueError(f"{where}: cannot be read ({_first_line(error)})") from None
    return {names[name]: tensor for name, tensor in tensors.items()}


def _from_torch(data: bytes, where: str, expected: Shapes, rename: Rename) -> dict[str, Tensor]:
    """Look at the archive and at what its pickle asks for before torch does."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError(f"{where}: holds compressed parts, which torch does not write")
            if sum(entry.file_size for entry in entries) > len(data):
                raise ValueError(f"{where}: its parts claim more bytes than it has")
            pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
            if len(pickles) != 1:
                raise ValueError(f"{where}: holds {len(pickles)} pickles, expected one")
            with archive.open(pickles[0]) as file:
                _check_pickle(file, where)
            if (part := archive.testzip()) is not None:
                raise ValueError(f"{where}: {part} is damaged")
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{where}: not a torch file in the format of torch 1.6 and later ({_first_line(error)})"
        ) from None
    try:
        state = load_torch(data)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    names = rename(list(map(str, state)))
    tensors = {names[str(name)]: tensor.detach() for name, tensor in state.items()}
    _check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, len(state), where, expected)
    for name, tensor in tensors.items():
        if tensor.dtype not in _TORCH_TYPES:
            raise ValueError(f"{where}: {name} is of type {tensor.dtype}, expected floating point")
    return tensors


def _check_pickle(file: BinaryIO | Any, where: str) -> None:
    """Refuse a pickle that names anything but what dense tensors need; its operations are read, not carried out."""
    try:
        for operation, argument, _ in pickletools.genops(file):
            if operation.name == "GLOBAL" and argument not in _HARMLESS:
                raise ValueError(f"{where}: asks for {str(argument).replace(' ', '.', 1)}, which tensors do not need")
            if operation.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                raise ValueError(f"{where}: asks for code in a way that torch does not ({operation.name})")
    except ValueError as error:
        if str(error).startswith(where):
            raise
        raise ValueError(f"{where}: its pickle is damaged ({_first_line(error)})") from None


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
