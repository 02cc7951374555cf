"""An extractor from a file: a network in ONNX form, run by ONNX Runtime on the CPU. Nothing in such a file is unpickled."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.experiment import OnnxConfig
from pipeline.errors import DataError, RefusedError, UsageError
from pipeline.metrics.features import FeatureExtractor
from pipeline.redaction import one_line

_NEEDED = "needs onnx and onnxruntime; install them with: pip install 'ddpm-pipe[onnx]'"


class OnnxExtractor(FeatureExtractor):
    """Features [n, width] by the network of an ONNX file, without logits; each image is resized and normalised as `settings` say.

    The network takes float32 [n, C, H, W], any n, and its first output is float32 [n, width]. `sha256` is that of the file, of its external
    data and of `settings`. DataError if the file cannot be read or is not such a network.
    """

    num_classes = 0
    batch_size = 32

    def __init__(self, path: Path, settings: OnnxConfig) -> None:
        network = _OnnxNetwork(path, settings)
        super().__init__(network, network.sha256)
        self.name = "onnx_" + re.sub(r"[^a-z0-9]+", "_", path.stem.lower())
        self.width = network.width
        self.min_images = 2 * self.width

    def to(self, device: torch.device) -> None:
        """Stay on the CPU."""

    def resize_rule(self, shape: tuple[int, int, int]) -> str:
        """Return how images of shape (C, H, W) become the network's input; RefusedError if their channels do not fit."""
        network: Any = self._network
        if shape[0] not in (1, network.channels):
            raise RefusedError(
                f"{self.name} judges images of {network.channels} channels, got {shape[0]}; use another extractor"
            )
        settings: OnnxConfig = network.settings
        height, width = network.size
        rule = f"{settings.resize} to {height}x{width} with antialias, mean {list(settings.mean)}, std {list(settings.std)}"
        return rule if shape[0] == network.channels else f"{rule}; gray repeated to {network.channels} channels"


class _OnnxNetwork(nn.Module):
    """The file's bytes, which travel to other processes, and a session that each process makes of them."""

    def __init__(self, path: Path, settings: OnnxConfig) -> None:
        super().__init__()
        self.path, self.settings = path, settings
        self.files = _read(path)
        described = json.dumps(settings.model_dump(), sort_keys=True)
        whole = hashlib.sha256(described.encode())
        for name, data in self.files.items():  # the graph's own name is no part of what it computes
            whole.update(hashlib.sha256(data).digest() + (b"" if name == path.name else name.encode()))
        self.sha256 = whole.hexdigest()
        self.channels, self.size = self._input()
        self.width = self._width()

    @cached_property
    def _session(self) -> Any:
        try:
            import onnxruntime
        except ImportError:
            raise UsageError(f"{self.path}: an extractor of this form {_NEEDED}") from None
        options = onnxruntime.SessionOptions()
        # results must not depend on the machine's cores: one thread for each batch, several batches at once
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.use_deterministic_compute = True
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory(prefix="onnx-") as folder:  # external data is found beside the graph
            for name, data in self.files.items():
                (there := Path(folder, name)).parent.mkdir(parents=True, exist_ok=True)
                there.write_bytes(data)
            return self._asked(
                lambda: onnxruntime.InferenceSession(
                    Path(folder, self.path.name), options, providers=["CPUExecutionProvider"]
                )
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_session"}

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [n, C, H, W] -> features float32 [n, width], and no logits [n, 0]."""
        settings = self.settings
        x = images.float() / 255
        if x.shape[2:] != self.size:
            x = functional.interpolate(x, self.size, mode=settings.resize, antialias=True)
        x = x.expand(-1, self.channels, -1, -1)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (settings.mean, settings.std))
        return torch.from_numpy(self._run(((x - mean) / std).numpy())), torch.empty(len(x), 0)

    def _run(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = self._asked(lambda: self._session.run(None, {self._name: x})[0])
        return found

    @property
    def _name(self) -> str:
        return str(self._session.get_inputs()[0].name)

    def _input(self) -> tuple[int, tuple[int, int]]:
        """Return the channels and the size (H, W) that the network takes; DataError if it does not take images."""
        inputs = self._session.get_inputs()
        shape = inputs[0].shape if inputs else []
        if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(shape) != 4 or isinstance(shape[0], int):
            got = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
            raise self._wrong(f"got inputs {got}, expected one, float32 [n, C, H, W] with any n")
        channels = shape[1] if isinstance(shape[1], int) else len(self.settings.mean)
        if {len(self.settings.mean), len(self.settings.std)} - {1, channels}:
            raise UsageError(
                f"evaluation.onnx.mean, std: got {len(self.settings.mean)} and {len(self.settings.std)} numbers, expected one for each of "
                f"the {channels} channels that {self.path} takes"
            )
        asked = self.settings.size
        height, width = (side if isinstance(side, int) else asked or 0 for side in shape[2:])
        if not height * width or (asked is not None and (height, width) != (asked, asked)):
            expected = f"{height}x{width}, which it takes" if height * width else "the side of the images that it takes"
            raise UsageError(f"evaluation.onnx.size: got {asked} for {self.path}, expected {expected}")
        return int(channels), (height, width)

    def _width(self) -> int:
        found = self._run(np.zeros((2, self.channels, *self.size), np.float32))
        if found.ndim != 2 or len(found) != 2 or found.dtype != np.float32:
            raise self._wrong(
                f"of two images its first output is {found.dtype} {list(found.shape)}, expected float32 [2, width]"
            )
        return int(found.shape[1])

    def _asked(self, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except Exception as error:  # ONNX Runtime raises many types of its own, derived from Exception
            raise self._wrong(f"ONNX Runtime refuses it ({one_line(error)})") from None

    def _wrong(self, why: str) -> DataError:
        return DataError(f"extractor {self.path}: {why}. Export the network that ends in the features.")


def _read(path: Path) -> dict[str, bytes]:
    """Return the bytes of the graph and of the files that hold its external data, by name, the graph first."""
    try:
        import onnx
        from onnx.external_data_helper import ExternalDataInfo, uses_external_data
    except ImportError:
        raise UsageError(f"{path}: an extractor of this form {_NEEDED}") from None
    name = path.name
    try:
        files = {name: path.read_bytes()}
        graph = onnx.load_model_from_string(files[name]).graph
        for tensor in graph.initializer:
            if uses_external_data(tensor):
                name = ExternalDataInfo(tensor).location
                if not (path.parent / name).resolve().is_relative_to(path.parent.resolve()):
                    raise DataError(f"extractor {path}: its data is in {name}, outside of its folder; move it there")
                files[name] = files.get(name) or (path.parent / name).read_bytes()
    except OSError as error:
        raise DataError(f"extractor {path}: {name} cannot be read ({error.strerror}); check the path") from None
    except DataError:
        raise
    except Exception as error:  # of protobuf
        raise DataError(f"extractor {path}: it is not an ONNX file ({one_line(error)})") from None
    return {path.name: files.pop(path.name), **dict(sorted(files.items()))}
