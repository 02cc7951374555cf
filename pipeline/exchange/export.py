"""Export a run's model in diffusers' layout, as safetensors, or as ONNX; none of them uses pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.config.context import Context
from pipeline.errors import StorageError, UsageError
from pipeline.exchange.diffusers_folder import write_pipeline
from pipeline.exchange.export_onnx import FILE as ONNX_FILE
from pipeline.exchange.export_onnx import require_onnx, write_onnx
from pipeline.storage.retention import Which
from pipeline.storage.runs import Run
from pipeline.training.trained import EXPERIMENT_FILE, Trained, not_trained

Format = Literal["diffusers", "safetensors", "onnx"]


@dataclass(frozen=True)
class ExportRequest:
    """Where a model is written, in which format, and which of its weights."""

    folder: Path
    form: Format
    checkpoint: Which = None
    weights: str = "ema"


@dataclass(frozen=True)
class ExportResult:
    """What was written. `notes` are a format's own: how to use it, how it was checked."""

    run: str
    step: int
    request: ExportRequest
    files: list[str]
    notes: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "run": self.run,
            "checkpoint_step": self.step,
            "weights": self.request.weights,
            "format": self.request.form,
            "folder": str(self.request.folder.absolute()),
            "files": self.files,
            **self.notes,
        }


def export_run(context: Context, reference: str, request: ExportRequest) -> ExportResult:
    """Write the model of a run's checkpoint into a new folder, completely or not at all.

    UsageError if the folder is not empty, or the model has no equivalent in the format.
    """
    run, folder, form = Run.find(context.home, reference, context.store, not_trained), request.folder, request.form
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: exists and is not an empty folder; give another one")
    if form == "onnx":
        require_onnx()
    trained = Trained.from_run(run, request.checkpoint, request.weights)
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        notes = _WRITERS[form](trained, partial)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except ValueError as error:
        raise UsageError(f"run {run.id} has no equivalent in the format {form}: {error}") from None
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror}); give another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return ExportResult(run.id, trained.step, request, files, notes)


def _write_diffusers(trained: Trained, folder: Path) -> dict[str, str]:
    write_pipeline(trained, folder)
    T = trained.diffusion.num_timesteps
    call = "pipeline()" if T == 1000 else f"pipeline(num_inference_steps={T})"
    return {"use": f"pipeline = DDPMPipeline.from_pretrained(folder); images = {call}.images"}


def _write_safetensors(trained: Trained, folder: Path) -> dict[str, str]:
    trained.save(folder)
    return {}


def _write_onnx(trained: Trained, folder: Path) -> dict[str, str]:
    difference = write_onnx(trained, folder)
    (folder / EXPERIMENT_FILE).write_text(json.dumps(trained.about(), indent=1))
    return {"checked": f"{ONNX_FILE} in ONNX Runtime differs by {difference:.1e} of the largest output at most"}


_WRITERS: dict[str, Callable[[Trained, Path], dict[str, str]]] = {
    "diffusers": _write_diffusers,
    "safetensors": _write_safetensors,
    "onnx": _write_onnx,
}
