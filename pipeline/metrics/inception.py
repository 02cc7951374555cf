"""The Inception extractor of the original FID code, with the weights of 2015-12-05.

The weights come from a path, a URL or the cache, are checked against a pinned sha256, and are read as tensors alone (`weights_only`).
"""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pipeline.data.image_set import Images
from pipeline.errors import DataError, RefusedError, StorageError
from pipeline.metrics.features import Extracted, check_images, extract_batches, in_batches
from pipeline.storage.durable import write_atomically
from pipeline.storage.foreign_tensors import load_torch

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS_VARIABLE = "DDPM_PIPE_INCEPTION_WEIGHTS"

_TIMEOUT_S = 30


class Inception:
    """Features [n, 2048] of the last pooling layer, and logits [n, 1008] without bias, as for the Inception Score."""

    name = "inception"
    width = 2048
    num_classes = 1008
    min_images = 4096  # twice the width; FID's custom is 10,000 or 50,000
    fit_rule = None

    def __init__(self, network: nn.Module, sha256: str, *, device: torch.device | None = None, batch_size: int = 32):
        self.sha256 = sha256
        self._device = device or torch.device("cpu")
        self._network = network.to(self._device).eval()
        self._batch_size = batch_size

    @classmethod
    def load(
        cls,
        source: str | None = None,
        *,
        sha256: str = INCEPTION_SHA256,
        cache_dir: Path | None = None,
        download: bool = True,
        device: torch.device | None = None,
    ) -> Inception:
        """Load the weights that `read_weights` finds; DataError if there are none or they do not fit this network."""
        from pipeline.metrics.inception_network import InceptionV3  # torchvision's import takes a second

        data = read_weights(source, sha256=sha256, cache_dir=cache_dir, download=download)
        network = InceptionV3()
        try:
            network.load_state_dict(load_torch(data), strict=True)
        except ValueError as error:
            raise DataError(f"Inception weights: {error}; use the published file") from None
        except (RuntimeError, TypeError, AttributeError) as error:
            raise DataError(
                f"Inception weights {sha256[:8]}: not the 2015-12-05 network ({_first_line(error)})"
            ) from None
        return cls(network, hashlib.sha256(data).hexdigest(), device=device)

    def to(self, device: torch.device) -> None:
        self._device = device
        self._network = self._network.to(device)

    def resize_rule(self, shape: tuple[int, int, int]) -> str:
        """Return how images of shape (C, H, W) become 3 x 299 x 299; RefusedError if C is neither 1 nor 3."""
        if shape[0] not in (1, 3):
            raise RefusedError(
                f"Inception judges images of 1 or 3 channels, got {shape[0]}; use the classifier extractor"
            )
        resize = "bilinear to 299x299 as TensorFlow 1, no antialias"
        return resize if shape[0] == 3 else f"{resize}; gray repeated to 3 channels"

    def __call__(self, images: Images) -> Extracted:
        """Extract from uint8 images [n, C, H, W] with C 1 or 3."""
        check_images(images, (1, 3))
        return extract_batches(self._extract, in_batches(images, self._batch_size), self, self._device)

    def _extract(self, images: Images) -> Extracted:
        x = torch.from_numpy(np.ascontiguousarray(images)).to(self._device)
        features, logits = self._network(x.expand(-1, 3, -1, -1))
        return Extracted(features.cpu().numpy(), logits.cpu().numpy())


def read_weights(
    source: str | None = None,
    *,
    sha256: str = INCEPTION_SHA256,
    cache_dir: Path | None = None,
    download: bool = True,
) -> bytes:
    """Return the bytes of the weights file with the hash `sha256`.

    Looked for in this order: `source` (a path or URL), DDPM_PIPE_INCEPTION_WEIGHTS, the cache, torch-fidelity's cache, and the published
    URL. A URL is downloaded into the cache, if `download` is True.
    """
    source = source or os.environ.get(WEIGHTS_VARIABLE) or None
    if source is not None and "://" not in source:
        return _read(Path(source).expanduser(), sha256)
    cached = (cache_dir or _user_cache()) / f"inception-{sha256}.pth"
    for path in (cached, Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rsplit("/", 1)[1]):
        if path.is_file() and (path == cached or source is None):
            return _read(path, sha256)
    url = source or INCEPTION_URL
    if not download:
        raise DataError(f"no Inception weights here; {_advice(url)}")
    data = _fetch(url)
    _check(data, sha256, url)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cache folder {cached.parent}: cannot be made ({error.strerror}); set XDG_CACHE_HOME"
        ) from None
    write_atomically(cached, data)
    return data


def _read(path: Path, sha256: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"Inception weights {path}: cannot be read ({error.strerror}); {_advice(INCEPTION_URL)}"
        ) from None
    _check(data, sha256, str(path))
    return data


def _check(data: bytes, sha256: str, where: str) -> None:
    got = hashlib.sha256(data).hexdigest()
    if got != sha256:
        raise DataError(
            f"Inception weights {where}: sha256 is {got[:16]}, expected {sha256[:16]}; remove it and fetch it again"
        )


def _fetch(url: str) -> bytes:
    """Download a file over http or https; its hash is checked before anything reads it."""
    if not url.startswith(("https://", "http://")):
        raise DataError(f"Inception weights: got {url!r}, expected a path or an https:// address")
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            data: bytes = response.read()
    except (OSError, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise DataError(
            f"Inception weights cannot be fetched from {url} ({_first_line(error)}); {_advice(url)}"
        ) from None
    return data


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ddpm-pipe"


def _advice(url: str) -> str:
    return (
        f"fetch {url} where there is a network and name the file in evaluation.inception_weights or {WEIGHTS_VARIABLE}"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
