"""Log the final model in MLflow: the EMA weights as safetensors and the code that reads them, without pickle."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

LOGGED_MODEL_FILE = Path(__file__).with_name("logged_model.py")
NAME = "ddpm"
STEP_TAG = "ddpm_pipe.step"
REQUIREMENTS = ("torch", "safetensors", "numpy", "pillow", "pydantic", "pyyaml", "mlflow")


def log_model(client: MlflowClient, run_id: str, experiment_id: str, folder: Path, step: int) -> None:
    """Log a folder for `pipeline.training.trained.Trained.load` as an MLflow model of the run; repeated calls log it once.

    The code of both packages and of a user-defined network is included, so `mlflow models serve` needs no checkout.
    """
    from mlflow.entities import LoggedModelOutput

    model = _entry(client, run_id, experiment_id, step)
    if model.status != "READY":
        with tempfile.TemporaryDirectory() as temporary:
            target = Path(temporary) / "model"
            _save(target, folder, run_id, model)
            client.log_model_artifacts(model.model_id, str(target))
        client.finalize_logged_model(model.model_id, "READY")
    outputs = client.get_run(run_id).outputs
    if outputs is None or model.model_id not in {output.model_id for output in outputs.model_outputs}:
        client.log_outputs(
            run_id, [LoggedModelOutput(model.model_id, step)]
        )  # a second row violates a constraint of MLflow's database


def _entry(client: MlflowClient, run_id: str, experiment_id: str, step: int) -> LoggedModel:
    """Return the model's entry in the store, created if it is missing."""
    known = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}' AND name = '{NAME}'")
    for model in known:
        if model.tags.get(STEP_TAG) == str(step):
            return model
    return client.create_logged_model(
        experiment_id, NAME, source_run_id=run_id, model_type="ddpm", tags={STEP_TAG: str(step)}
    )


def _save(target: Path, folder: Path, run_id: str, model: LoggedModel) -> None:
    # importing pyfunc makes MLflow warn about a type hint in its own code
    warnings.filterwarnings("ignore", message=".*type hint", category=UserWarning)
    import mlflow.pyfunc
    from mlflow.models import Model

    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)  # a user has no use for "Validating input example"
    mlflow.pyfunc.save_model(
        str(target),
        python_model=str(LOGGED_MODEL_FILE),
        artifacts={"model": str(folder)},
        code_paths=[str(path) for path in _code(folder)],
        signature=_signature(),
        input_example=({"n": [4]}, {"seed": 0, "steps": 0}),
        pip_requirements=[f"{name}=={version(name)}" for name in REQUIREMENTS],
        mlflow_model=Model(
            artifact_path=model.artifact_location, run_id=run_id, model_uuid=model.model_id, model_id=model.model_id
        ),
    )
    for cache in target.rglob("__pycache__"):
        shutil.rmtree(cache)


def _code(folder: Path) -> list[Path]:
    """Return the packages that the model needs: ours, and that of a user-defined network."""
    about = json.loads((folder / "experiment.json").read_text())
    own, colon, _ = about["experiment"]["model"]["type"].partition(":")
    modules = ["ddpm", "pipeline", *([own.partition(".")[0]] if colon else [])]
    found = []
    for module in modules:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise ValueError(f"model.type: the code of {module!r} was not found")
        origin = Path(spec.origin)
        found.append(origin.parent if origin.name == "__init__.py" else origin)
    return found


def _signature() -> object:
    """Return the signature of `predict`: input n, parameters seed and steps, output PNG bytes."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.long, "n")]),
        outputs=Schema([ColSpec(DataType.binary, "png")]),
        params=ParamSchema([ParamSpec("seed", DataType.long, 0), ParamSpec("steps", DataType.long, 0)]),
    )
