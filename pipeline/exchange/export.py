"""A run's model as files that other programs read: diffusers' layout, our own safetensors, or ONNX. No pickle in any of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import StorageError, UsageError
from pipeline.exchange.diffusers_folder import write_pipeline
from pipeline.exchange.export_onnx import FILE as ONNX_FILE
from pipeline.exchange.export_onnx import require_onnx, write_onnx
from pipeline.storage.runs import Run
from pipeline.training.trained import EXPERIMENT_FILE, Trained

Format = Literal["diffusers", "safetensors", "onnx"]


def export_run(run: Run, folder: Path, form: Format, step: int | None, weights: str) -> dict[str, Any]:
    """Write the model of a run's checkpoint into a new folder, whole or not at all; return what was written.

    UsageError where the folder holds something, or the model has no equal in that format; the reason is told.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: exists and is not an empty folder; give another one")
    if form == "onnx":
        require_onnx()
    trained = Trained.from_run(run, step, weights)
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
        raise UsageError(f"run {run.id} has no equal in the format {form}: {error}") from None
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror}); give another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    about = {"run": run.id, "checkpoint_step": trained.step, "weights": weights, "format": form}
    return {**about, "folder": str(folder), "files": files, **notes}


def _write_diffusers(trained: Trained, folder: Path) -> dict[str, Any]:
    write_pipeline(trained, folder)
    T = trained.diffusion.num_timesteps
    call = "pipeline()" if T == 1000 else f"pipeline(num_inference_steps={T})"
    return {"use": f"pipeline = DDPMPipeline.from_pretrained(folder); images = {call}.images"}


def _write_safetensors(trained: Trained, folder: Path) -> dict[str, Any]:
    trained.save(folder)
    return {}


def _write_onnx(trained: Trained, folder: Path) -> dict[str, Any]:
    difference = write_onnx(trained, folder)
    (folder / EXPERIMENT_FILE).write_text(json.dumps(trained.about(), indent=1))
    return {"checked": f"{ONNX_FILE} in ONNX Runtime differs by {difference:.1e} of the largest output at most"}


_WRITERS: dict[str, Callable[[Trained, Path], dict[str, Any]]] = {
    "diffusers": _write_diffusers,
    "safetensors": _write_safetensors,
    "onnx": _write_onnx,
}
