"""Files of strangers: what is no file of dense tensors of the expected shapes is refused before anything of it is used."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.storage.foreign_tensors import load_torch, read_json, read_tensors

SHAPES: dict[str, tuple[int, ...]] = {"a.weight": (3, 2), "a.bias": (3,)}


def tensors(**changes: Any) -> dict[str, Any]:
    return {"a.weight": torch.arange(6.0).view(3, 2), "a.bias": torch.ones(3)} | changes


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_sound_files_are_read(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    path = tmp_path / f"x.{suffix}"
    state = {name: tensor.to(dtype) for name, tensor in tensors().items()}
    save_file(state, path, metadata={"format": "pt"}) if suffix == "safetensors" else torch.save(state, path)
    found = read_tensors(path, SHAPES)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_parameters_and_ordered_dictionaries_are_tensors_too(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 3)
    state = OrderedDict(("a." + name, parameter) for name, parameter in layer.named_parameters())
    torch.save(state, tmp_path / "x.bin")
    assert torch.equal(read_tensors(tmp_path / "x.bin", SHAPES)["a.bias"], layer.bias)


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return os.mkdir, (str(self.path),)


def sparse() -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[0, 2], [1, 0]]), torch.ones(2), (3, 2), check_invariants=True)


def sparse_out_of_bounds() -> torch.Tensor:
    """Indices that lie outside the tensor: made dense, it would write there (pytorch's sparse proof of concept)."""
    far = torch.tensor([[0, 10**6], [1, 10**6]])
    return torch.sparse_coo_tensor(far, torch.ones(2), (3, 2), check_invariants=False)


DAMAGE: dict[str, Callable[[Path, Path], None]] = {
    "a pickle that runs code": lambda path, canary: torch.save(tensors(extra=Canary(canary)), path),
    "code in a tensor's place": lambda path, canary: torch.save(Canary(canary), path),
    "a sparse tensor": lambda path, _: torch.save(tensors(**{"a.weight": sparse()}), path),
    "a sparse tensor out of its bounds": lambda path, _: torch.save(
        tensors(**{"a.weight": sparse_out_of_bounds()}), path
    ),
    "a network": lambda path, _: torch.save(torch.nn.Linear(2, 3), path),
    "a list": lambda path, _: torch.save([1, 2], path),
    "another shape": lambda path, _: torch.save(tensors(**{"a.bias": torch.ones(4)}), path),
    "a tensor too few": lambda path, _: torch.save({"a.bias": torch.ones(3)}, path),
    "a tensor too many": lambda path, _: torch.save(tensors(b=torch.ones(1)), path),
    "integers": lambda path, _: torch.save(tensors(**{"a.bias": torch.ones(3, dtype=torch.int64)}), path),
    "a value that is not finite": lambda path, _: torch.save(tensors(**{"a.bias": torch.full((3,), torch.nan)}), path),
    "an old file": lambda path, _: torch.save(tensors(), path, _use_new_zipfile_serialization=False),
    "no file of torch": lambda path, _: path.write_bytes(b"not a zip"),
    "an empty file": lambda path, _: path.write_bytes(b""),
    "a web page": lambda path, _: path.write_bytes(b"<html>404</html>" * 100),
    "far too large a file": lambda path, _: os.truncate(_touched(path), 10**12),
}


def _touched(path: Path) -> Path:
    path.touch()
    return path


@pytest.mark.parametrize("damage", DAMAGE)
def test_torch_files_that_hold_anything_else_are_refused(damage: str, tmp_path: Path) -> None:
    path, canary = tmp_path / "x.bin", tmp_path / "canary"
    DAMAGE[damage](path, canary)
    with pytest.raises(ValueError, match=r"^x\.bin") as told:
        read_tensors(path, SHAPES)
    assert "\n" not in str(told.value)
    assert not canary.exists()


def test_the_canary_sings_where_it_is_let() -> None:
    """The canary of the test above would have shown itself: plain unpickling runs it."""
    code = (
        "import pickle, sys; from pathlib import Path; from tests.pipeline.exchange.test_foreign_tensors import Canary; "
        "path = Path(sys.argv[1]); pickle.loads(pickle.dumps(Canary(path))); assert path.is_dir(); path.rmdir()"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(os.environ["TMPDIR"]) / "canary")], check=True)


def test_a_flipped_bit_in_a_torch_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save(tensors(), path)
    data = bytearray(path.read_bytes())
    at = data.find(struct.pack("<f", 4.0))
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        read_tensors(path, SHAPES)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.zeros(3, 2), "a.bias": torch.zeros(3)}, tmp_path / "plain.bin")
    with (
        zipfile.ZipFile(tmp_path / "plain.bin") as plain,
        zipfile.ZipFile(tmp_path / "x.bin", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
        bomb.writestr("archive/data/9", bytes(50_000_000))
    with pytest.raises(ValueError, match="compressed"):
        read_tensors(tmp_path / "x.bin", SHAPES)


def header(content: Any, length: int | None = None, data: bytes = bytes(36)) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


SOUND = {
    "a.weight": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]},
    "a.bias": {"dtype": "F32", "shape": [3], "data_offsets": [24, 36]},
}
HEADERS: dict[str, bytes] = {
    "a header as long as a terabyte": header(SOUND, 10**12),
    "a header of 2^64 - 1 bytes": header(SOUND, 2**64 - 1),
    "a header longer than the file": header(SOUND, 400),
    "no header": b"\0\0",
    "a header that is no JSON": header(b"{" * 100),
    "a deep header": header(b'{"a":' * 100_000),
    "a header that is a list": header([1]),
    "a shape of a billion": header(SOUND | {"a.bias": {"dtype": "F32", "shape": [10**9], "data_offsets": [24, 36]}}),
    "shapes that are words": header(SOUND | {"a.bias": {"dtype": "F32", "shape": ["3"], "data_offsets": [24, 36]}}),
    "offsets outside the file": header(SOUND | {"a.bias": {"dtype": "F32", "shape": [3], "data_offsets": [24, 3600]}}),
    "offsets that overlap": header(SOUND | {"a.bias": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}),
    "integers": header(SOUND | {"a.bias": {"dtype": "I32", "shape": [3], "data_offsets": [24, 36]}}),
    "a tensor too many": header(SOUND | {"b": {"dtype": "F32", "shape": [0], "data_offsets": [36, 36]}}),
    "a tensor too few": header({"a.weight": SOUND["a.weight"]}, data=bytes(24)),
}


@pytest.mark.parametrize("damage", HEADERS)
def test_safetensors_files_that_hold_anything_else_are_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(HEADERS[damage])
    with pytest.raises(ValueError, match=r"^x\.safetensors") as told:
        read_tensors(path, SHAPES)
    assert "\n" not in str(told.value)


def test_the_headers_above_are_sound_but_for_their_damage(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(header(SOUND))
    assert read_tensors(tmp_path / "x.safetensors", SHAPES).keys() == SHAPES.keys()


@pytest.mark.parametrize("content", [b"[1]", b"{", b"[" * 1_000_000, b'"' + b"x" * (5 << 20) + b'"', b"\xff\xfe"])
def test_json_that_is_no_object_or_too_large_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_bytes_of_an_old_file_of_tensors_are_read_where_their_hash_is_known() -> None:
    """The published Inception weights may be in the old format; what vouches for them is their hash."""
    file = io.BytesIO()
    torch.save(tensors(), file, _use_new_zipfile_serialization=False)
    assert torch.equal(load_torch(file.getvalue())["a.bias"], torch.ones(3))
