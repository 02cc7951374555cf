"""MNIST, Fashion-MNIST and CIFAR-10, from torchvision's folder layout or from the network.

The published formats are read: IDX (gzipped or not) and the binary version of CIFAR. The version of CIFAR that torchvision downloads
consists of pickles, which can run code, and is not read. Neither is torchvision used for IDX files: importing it takes longer than
reading them, and its downloads have no timeout.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError, UsageError
from pipeline.ingest.choice import ALL_SPLITS, split_of
from pipeline.ingest.download import Archive, fetch, find
from pipeline.ingest.label_values import Classes
from pipeline.ingest.rows import Item
from pipeline.ingest.sources import Source

Array = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Set:
    name: str
    class_names: tuple[str, ...]
    archives: dict[str, tuple[Archive, ...]]  # by split
    read: Callable[[list[Path], str], tuple[Array, Array]]  # [N, H, W, C] and [N]
    shape: tuple[int, int, int]  # (C, H, W)
    num_rows: dict[str, int]  # by split


def torchvision_set(name: str, split: str | None, downloads: Path, offline: bool, say: Callable[[str], None]) -> Source:
    """Return the source `mnist`, `fashion-mnist` or `cifar10`, by default the split train.

    Args:
        downloads: folder of the published files, in torchvision's layout.
        offline: never download.
        say: called with a line per download.

    Raises:
        UsageError: there is no such split.
        DataError: while iterating, if files are missing and cannot be downloaded, or are damaged.
    """
    known = SETS[name]
    wanted = "train" if split is None else split if split == ALL_SPLITS else split_of(split)
    if wanted not in (*known.archives, ALL_SPLITS):
        raise UsageError(f"{name} has no split {split!r}: give one of {', '.join([*known.archives, ALL_SPLITS])}")
    splits = list(known.archives) if wanted == ALL_SPLITS else [wanted]
    archives = list(dict.fromkeys(archive for s in splits for archive in known.archives[s]))
    missing = [archive for archive in archives if find(archive, downloads) is None]

    def items() -> Iterator[Item]:
        for s in splits:
            paths = [fetch(archive, downloads, offline, say) for archive in known.archives[s]]
            with _damage(paths[0].parent):
                images, labels = known.read(paths, s)
            Classes(known.class_names).numbers(labels, f"{name} {s}")
            for row, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield Item(f"{name} {s}, row {row}", image, int(label))

    def key() -> str:
        found = [(a, find(a, downloads)) for a in archives]
        return f"{name} {splits} {[a.sha256 if path is None else _sha256(path) for a, path in found]}"

    megabytes = sum(archive.num_bytes for archive in missing) / 1e6
    return Source(
        name=name,
        origin=f"{name} (split {wanted})",
        items=items,
        key=key,
        class_names=known.class_names,
        has_labels=True,
        shape=known.shape,
        num_rows=sum(known.num_rows[s] for s in splits),
        note="" if split else f"taking split 'train' of {name} (also there: test)",
        download=f"{megabytes:.0f} MB from {missing[0].url.rpartition('/')[0]}" if missing else "",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _damage(where: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, ValueError, KeyError, struct.error, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{where} holds a damaged file ({error}): delete it to download it again") from None


def _read_mnist(paths: list[Path], split: str) -> tuple[Array, Array]:
    images, labels = (read_idx(path) for path in paths)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(f"images {images.shape} and labels {labels.shape} do not belong together")
    return images[..., None], labels


def read_idx(path: Path) -> Array:
    """Read an array of unsigned bytes in LeCun's IDX format, gzipped or not; ValueError for anything else."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    zero, kind, num_dimensions = struct.unpack(">HBB", data[:4])
    if zero != 0 or kind != 0x08:
        raise ValueError(f"{path.name} is not an IDX file of unsigned bytes")
    shape = struct.unpack_from(f">{num_dimensions}I", data, 4)
    begin = 4 + 4 * num_dimensions
    if len(data) - begin != math.prod(shape):
        raise ValueError(f"{path.name} holds {len(data) - begin} bytes, its header says {shape}")
    return np.frombuffer(data, dtype=np.uint8, offset=begin).reshape(shape)


def _read_cifar10(paths: list[Path], split: str) -> tuple[Array, Array]:
    """Read records of one label byte and 3x32x32 pixels; five files for training, one for testing."""
    files = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    parts = []
    with tarfile.open(paths[0]) as archive:
        for name in files:
            member = archive.extractfile(f"cifar-10-batches-bin/{name}")
            if member is None:
                raise ValueError(f"{name} is missing")
            parts.append(np.frombuffer(member.read(), dtype=np.uint8).reshape(-1, 1 + 3 * 32 * 32))
    records = np.concatenate(parts)
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]


def _idx_archives(url: str, folder: str, files: dict[str, tuple[int, str]]) -> dict[str, tuple[Archive, ...]]:
    found = {name: Archive(f"{url}{name}", f"{folder}/raw/{name}", size, sha) for name, (size, sha) in files.items()}
    return {
        "train": tuple(archive for name, archive in found.items() if name.startswith("train")),
        "test": tuple(archive for name, archive in found.items() if name.startswith("t10k")),
    }


_MNIST = _idx_archives(
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "MNIST",
    {
        "train-images-idx3-ubyte.gz": (9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        "train-labels-idx1-ubyte.gz": (28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        "t10k-images-idx3-ubyte.gz": (1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        "t10k-labels-idx1-ubyte.gz": (4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
    },
)
_FASHION = _idx_archives(
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    "FashionMNIST",
    {
        "train-images-idx3-ubyte.gz": (26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
        "train-labels-idx1-ubyte.gz": (29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
        "t10k-images-idx3-ubyte.gz": (4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
        "t10k-labels-idx1-ubyte.gz": (5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
    },
)
_CIFAR10 = Archive(
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "cifar-10-binary.tar.gz",
    170052171,
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
_GARMENTS = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
_OBJECTS = "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck"

SETS = {
    known.name: known
    for known in (
        _Set("mnist", tuple("0123456789"), _MNIST, _read_mnist, (1, 28, 28), {"train": 60_000, "test": 10_000}),
        _Set(
            "fashion-mnist",
            tuple(_GARMENTS.split(",")),
            _FASHION,
            _read_mnist,
            (1, 28, 28),
            {"train": 60_000, "test": 10_000},
        ),
        _Set(
            "cifar10",
            tuple(_OBJECTS.split(",")),
            {"train": (_CIFAR10,), "test": (_CIFAR10,)},
            _read_cifar10,
            (3, 32, 32),
            {"train": 50_000, "test": 10_000},
        ),
    )
}
