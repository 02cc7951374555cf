"""The file that MLflow runs to load a logged model: `predict({"n": 4})` returns four images.

Models from code: nothing is pickled. Beside this file the logged model holds the EMA weights (safetensors), the resolved
experiment (JSON) and the code of both packages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

MAX_IMAGES = 10_000


class LoggedDDPM(PythonModel):  # type: ignore[misc]
    """A trained model behind MLflow's `predict`."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read weights and settings."""
        from pipeline.training.trained import Trained

        self.trained = Trained.load(Path(context.artifacts["model"]))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> Any:
        """Return uint8 images [n, H, W, C]; image i is a function of (seed, i).

        `model_input` has one row with column `n`; parameters: `seed`, and `steps` (0: the run's own number of network
        calls).
        """
        import torch

        from pipeline.sampling.generation import generator_of
        from pipeline.training.device import serving_compute

        n = int(model_input["n"].iloc[0])
        if not 1 <= n <= MAX_IMAGES:
            raise ValueError(f"n: got {n}; expected 1 to {MAX_IMAGES}")
        options = params or {}
        trained, sampling = self.trained, self.trained.experiment.sampling
        if options.get("steps"):
            sampling = sampling.model_copy(update={"steps": int(options["steps"])})
        compute = serving_compute()
        compute.place(trained.model)
        seed = int(options.get("seed", 0))
        generator = generator_of(
            trained.experiment, trained.model, trained.shape, sampling, seed, compute, trained.class_names
        )
        return torch.cat(list(generator.generate(n))).permute(0, 2, 3, 1).numpy()


mlflow.models.set_model(LoggedDDPM())
