"""Arrays with a card that describes them, in one safetensors file. Damage is noticed, and reading it runs no code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

Arrays = dict[str, npt.NDArray[Any]]

# One key for everything: safetensors does not keep the order of several, and equal content must give equal bytes.
_KEY = "ddpm-pipe"


def pack(arrays: Mapping[str, npt.NDArray[Any]], card: Mapping[str, Any]) -> bytes:
    """Return the bytes of a safetensors file. Equal arrays and cards give equal bytes. The card must be JSON."""
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    header = json.dumps({"card": card, "sha256": _digest(card, whole)}, sort_keys=True)
    return bytes(safetensors.numpy.save(whole, metadata={_KEY: header}))


def unpack(data: bytes) -> tuple[dict[str, Any], Arrays]:
    """Return the card and the arrays that `pack` was given. Raises ValueError for anything else, and if a bit of either has flipped."""
    try:
        arrays: Arrays = safetensors.numpy.load(data)
        # The layout of safetensors: the length of a JSON header (8 bytes, little endian), the header, the arrays.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        content = json.loads(header["__metadata__"][_KEY])
        card: dict[str, Any] = content["card"]
        expected = content["sha256"]
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a file of arrays with a card ({str(error).splitlines()[0]})") from None
    if _digest(card, arrays) != expected:
        raise ValueError("its content is damaged")
    return card, arrays


def read_card(path: Path) -> dict[str, Any]:
    """Return the card of a file that `pack` made, from its header alone. Damage to the arrays goes unnoticed, a file cut short does not.

    Raises OSError if the file cannot be read, and ValueError if `pack` did not make it.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            card: dict[str, Any] = json.loads(file.metadata()[_KEY])["card"]
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a file of arrays with a card ({str(error).splitlines()[0]})") from None
    return card


def _digest(card: Mapping[str, Any], arrays: Arrays) -> str:
    digest = hashlib.sha256(json.dumps(card, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name}\0{arrays[name].dtype.str}\0{arrays[name].shape}\0".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()
