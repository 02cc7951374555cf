"""The script that MLflow runs to load a logged model: `predict({"n": [4]})` returns four images as PNGs.

The model is logged from code, without pickle. The logged model also contains the EMA weights (safetensors), the resolved experiment (JSON)
and the code of both packages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext

MAX_IMAGES = 10_000


class LoggedDDPM(PythonModel):  # type: ignore[misc]
    """A trained model for MLflow's `predict`."""

    def load_context(self, context: PythonModelContext) -> None:
        from pipeline.training.trained import Trained

        self.trained = Trained.load(Path(context.artifacts["model"]))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Return n rows with column `png`, a PNG file's bytes (base64 over HTTP); image i is a function of (seed, i).

        `model_input` has one row with column `n`; parameters: `seed`, and `steps` (0: the run's setting). Invalid input raises an
        MlflowException, which a server returns to the client.
        """
        from pipeline.errors import PipelineError
        from pipeline.pictures.pictures import as_png, picture_of
        from pipeline.sampling.generation import make_sampler
        from pipeline.training.device import serving_compute

        options = params or {}
        seed, steps = int(options.get("seed", 0)), int(options.get("steps", 0))
        trained = self.trained
        try:
            n = _number_of(model_input)
            _require("seed", seed, 0, 2**63 - 1)
            sampling = self._sampling(steps)
            compute = serving_compute()
            compute.place(trained.model)
            generator = make_sampler(
                trained.experiment, trained.model, trained.shape, sampling, seed, compute, trained.class_names
            )
            images = [as_png(picture_of(image)) for chunk in generator.generate(n) for image in chunk]
        except PipelineError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        return pd.DataFrame({"png": images})

    def _sampling(self, steps: int) -> Any:
        """Return the sampling settings with this number of steps, 0 for the run's; raise if the model does not allow it."""
        from pipeline.training.combinations import check_sampling

        experiment = self.trained.experiment
        if steps == 0:
            return experiment.sampling
        _require("steps", steps, 1, experiment.diffusion.num_timesteps)
        sampling = experiment.sampling.model_copy(update={"steps": steps})
        check_sampling(experiment, sampling)
        return sampling


def _number_of(model_input: pd.DataFrame) -> int:
    """Return the requested number of images."""
    if len(model_input) != 1:
        raise MlflowException.invalid_parameter_value(
            f"n: got {len(model_input)} rows; expected one, such as {{'n': [4]}}"
        )
    return _require("n", int(model_input["n"].iloc[0]), 1, MAX_IMAGES)


def _require(name: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise MlflowException.invalid_parameter_value(f"{name}: got {value}; expected {low} to {high}")
    return value


mlflow.models.set_model(LoggedDDPM())
