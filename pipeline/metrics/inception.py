"""The Inception extractor of the original FID code, with the weights of 2015-12-05.

The weights come from a path, a URL or torch.hub's cache. Their sha256 is checked, and they are read as tensors alone (`weights_only`).
"""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path

import torch

from pipeline.errors import DataError, RefusedError
from pipeline.metrics.features import FeatureExtractor
from pipeline.redaction import one_line
from pipeline.storage.durable import storage_errors, write_atomically
from pipeline.storage.foreign_tensors import load_torch

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS_VARIABLE = "DDPM_PIPE_INCEPTION_WEIGHTS"

_TIMEOUT_S = 30


class Inception(FeatureExtractor):
    """Features [n, 2048] of the last pooling layer, and logits [n, 1008] without bias, as for the Inception Score."""

    name = "inception"
    width = 2048
    num_classes = 1008
    min_images = 4096  # twice the width; FID's custom is 10,000 or 50,000
    batch_size = 32

    @classmethod
    def load(
        cls,
        source: str | None = None,
        *,
        sha256: str = INCEPTION_SHA256,
        download: bool = True,
        device: torch.device | None = None,
    ) -> Inception:
        """Load the weights that `read_weights` finds; DataError if there are none or they do not fit this network."""
        from pipeline.metrics.inception_network import InceptionV3  # torchvision's import takes a second

        data = read_weights(source, sha256=sha256, download=download)
        network = InceptionV3()
        try:
            network.load_state_dict(load_torch(data), strict=True)
        except ValueError as error:
            raise DataError(f"Inception weights: {error}; use the published file") from None
        except (RuntimeError, TypeError, AttributeError) as error:
            raise DataError(f"Inception weights {sha256[:8]}: not the 2015-12-05 network ({one_line(error)})") from None
        return cls(network, hashlib.sha256(data).hexdigest(), device=device)

    def resize_rule(self, shape: tuple[int, int, int]) -> str:
        """Return how images of shape (C, H, W) become 3 x 299 x 299; RefusedError if C is neither 1 nor 3."""
        if shape[0] not in (1, 3):
            raise RefusedError(
                f"Inception judges images of 1 or 3 channels, got {shape[0]}; use the classifier extractor"
            )
        resize = "bilinear to 299x299 as TensorFlow 1, no antialias"
        return resize if shape[0] == 3 else f"{resize}; gray repeated to 3 channels"


def read_weights(source: str | None = None, *, sha256: str = INCEPTION_SHA256, download: bool = True) -> bytes:
    """Return the bytes of the weights file with the hash `sha256`.

    Looked for in this order: `source` (a path or URL), DDPM_PIPE_INCEPTION_WEIGHTS, torch.hub's cache (torch-fidelity's too), and the
    published URL. A URL is downloaded into the cache, if `download` is True.
    """
    source = source or os.environ.get(WEIGHTS_VARIABLE) or INCEPTION_URL
    cached = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rsplit("/", 1)[1]
    path = cached if "://" in source else Path(source).expanduser()
    if "://" in source and not cached.is_file():
        if not download:
            raise DataError(f"no Inception weights here; {_advice(source)}")
        data = _fetch(source)
        _check(data, sha256, source)
        with storage_errors(cached):
            cached.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cached, data)
        return data
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
        raise DataError(f"Inception weights cannot be fetched from {url} ({one_line(error)}); {_advice(url)}") from None
    return data


def _advice(url: str) -> str:
    return (
        f"fetch {url} where there is a network and name the file in evaluation.inception_weights or {WEIGHTS_VARIABLE}"
    )
