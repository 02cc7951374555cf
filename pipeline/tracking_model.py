"""The final model in MLflow: the denoiser's EMA weights as safetensors with the code that reads them, and no pickle."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOGGED_MODEL_FILE = Path(__file__).with_name("logged_model.py")
REQUIREMENTS = ("torch", "safetensors", "numpy", "pillow", "pydantic", "pyyaml", "mlflow")


def log_model(client: MlflowClient, run_id: str, experiment_id: str, folder: Path, name: str, step: int) -> None:
    """Log the model folder (`pipeline.checkpoint.load_model` reads it) as an MLflow model of the run, once.

    The code of both packages goes with it, so that `mlflow models serve` needs no checkout.
    """
    import mlflow.pyfunc
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    known = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}' AND name = '{name}'")
    if any(model.status == "READY" and model.tags.get("ddpm_pipe.step") == str(step) for model in known):
        return
    tags = {"ddpm_pipe.step": str(step)}
    model = client.create_logged_model(experiment_id, name, source_run_id=run_id, model_type="ddpm", tags=tags)
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / "model"
        mlflow.pyfunc.save_model(
            str(target),
            python_model=str(LOGGED_MODEL_FILE),
            artifacts={"model": str(folder)},
            code_paths=[str(package) for package in _packages()],
            signature=_signature(),
            pip_requirements=[f"{name}=={version(name)}" for name in REQUIREMENTS],
            mlflow_model=Model(
                artifact_path=model.artifact_location, run_id=run_id, model_uuid=model.model_id, model_id=model.model_id
            ),
        )
        for cache in sorted(target.rglob("__pycache__"), reverse=True):
            for file in cache.iterdir():
                file.unlink()
            cache.rmdir()
        client.log_model_artifacts(model.model_id, str(target))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])


def _packages() -> list[Path]:
    import ddpm
    import pipeline

    return [Path(package.__file__).parent for package in (ddpm, pipeline) if package.__file__]


def _signature() -> object:
    """What `predict` takes (a number of images; seed and steps as parameters) and gives (uint8 [n, H, W, C])."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.long, "n")]),
        outputs=Schema([TensorSpec(np.dtype("uint8"), (-1, -1, -1, -1))]),
        params=ParamSchema([ParamSpec("seed", DataType.long, 0), ParamSpec("steps", DataType.long, 0)]),
    )
