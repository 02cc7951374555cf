"""Export the denoiser as an ONNX graph, and compare it with the network in ONNX Runtime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.errors import UsageError
from pipeline.training.trained import Trained

FILE = "denoiser.onnx"
OPSET = 20
TOLERANCE = 1e-4  # of the largest output
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def require_onnx() -> None:
    """Raise UsageError if the optional packages are not installed."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(f"--format onnx needs {', '.join(missing)}; install them with: pip install 'ddpm-pipe[onnx]'")


def write_onnx(trained: Trained, folder: Path) -> float:
    """Write `denoiser.onnx`, and return the largest difference of its outputs from the network's.

    Inputs x_t float32 [B,C,H,W] and t int64 [B], and y int64 [B] for a class-conditional network; any B. Output "prediction". ValueError
    if the network cannot be exported, or the graph computes something else.
    """
    model = trained.model.cpu().eval()
    names = ["x_t", "t", "y"] if trained.experiment.model.class_conditional else ["x_t", "t"]
    inputs = _inputs(trained, 2)[: len(names)]
    batch = torch.export.Dim("batch", min=1, max=4096)
    with torch.no_grad(), _quietly():
        try:
            program = torch.onnx.export(
                model, inputs, dynamo=True, opset_version=OPSET, input_names=names, output_names=["prediction"],
                dynamic_shapes=tuple({0: batch} for _ in names), verbose=False,
            )  # fmt: skip
        except Exception as error:  # the exporter raises many types, especially for user-defined networks
            raise ValueError(f"the network has no ONNX form ({str(error).strip().splitlines()[0][:200]})") from None
        assert program is not None
        program.save(str(folder / FILE), external_data=False)
    difference = max(_difference(model, folder / FILE, trained, names, count) for count in (1, 3))
    if not difference <= TOLERANCE:
        raise ValueError(f"its ONNX form differs from the network by {difference:.2g} of the largest output")
    return difference


def _difference(model: nn.Module, path: Path, trained: Trained, names: list[str], count: int) -> float:
    """Return the largest difference over `count` inputs, from the first step to the last, relative to the largest output."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = _inputs(trained, count)[: len(names)]
    with torch.no_grad():
        ours: Tensor = model(*inputs)
    (theirs,) = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    return float((ours - torch.from_numpy(theirs)).abs().max() / ours.abs().max().clamp(min=1e-12))


def _inputs(trained: Trained, count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    t = torch.linspace(trained.diffusion.num_timesteps - 1, 0, count).long()
    return torch.randn(count, *trained.shape, generator=generator), t, torch.zeros(count, dtype=torch.int64)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the exporter's logs and warnings."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
