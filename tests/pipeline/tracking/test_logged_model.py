"""The final model in MLflow: loads with pickle refused, outside the checkout, and gives the images that the run gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.experiment import DiffusionConfig, Experiment, ModelConfig, SamplingConfig
from pipeline.sampling.generation import Denoiser
from pipeline.storage.runs import Run
from pipeline.tracking.tracker import Tracker, TrackingSettings
from pipeline.training.device import Compute
from pipeline.training.models import build_model
from pipeline.training.trained import Trained
from tests.kit.tracking import client_of, forget_receipts

LOAD = """
import io, sys, warnings
warnings.simplefilter("ignore")  # MLflow's own
import numpy as np
from PIL import Image
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/" + sys.argv[2])
import pipeline
assert "mlartifacts" in pipeline.__file__, pipeline.__file__  # the code that came with the model
pngs = model.predict({"n": [3]}, params={"seed": 5, "steps": 3})["png"]
np.save(sys.argv[3], [np.asarray(Image.open(io.BytesIO(png))) for png in pngs])
refused = [({"n": [0]}, {}), ({"n": [1, 2]}, {}), ({"n": [1]}, {"steps": -1}), ({"n": [1]}, {"steps": 51}), ({"n": [1]}, {"seed": -1})]
for asked, params in refused:
    try:
        model.predict(asked, params=params)
    except mlflow.MlflowException as error:
        print(error.error_code, error.message)
"""
TOLD = [
    "n: got 0; expected 1 to 10000",
    "n: got 2 rows; expected one, such as {'n': [4]}",
    "steps: got -1; expected 1 to 50",
    "steps: got 51; expected 1 to 50",
    f"seed: got -1; expected 0 to {2**63 - 1}",
]
OWN_NETWORK = """
import torch

class Own(torch.nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain))

    def forward(self, x, t):
        return self.gain * x
"""


def made_model(experiment: Experiment) -> Trained:
    torch.manual_seed(0)
    model = build_model(experiment, (1, 8, 8)).eval()
    return Trained(model, experiment, (1, 8, 8), 100, "ema", training_s=1.0)


def log(run: Run, store: TrackingSettings, model: Trained) -> str:
    tracker = Tracker(run.folder, store)
    tracker.start("model", {}, {}, "")
    tracker.model(model.save(run.folder / "model"), step=100)
    assert tracker.close(), tracker.problem
    client = client_of(store)
    (found,) = client.search_logged_models([client.get_run(run.mlflow_run_id).info.experiment_id])
    assert str(found.status) == "READY"
    (output,) = client.get_run(run.mlflow_run_id).outputs.model_outputs
    assert (output.model_id, output.step) == (found.model_id, 100)
    return str(found.model_id)


@pytest.mark.slow
def test_it_loads_without_pickle_and_gives_the_runs_images(
    run: Run, store: TrackingSettings, home: Path, tmp_path: Path
) -> None:
    experiment = Experiment(
        model=ModelConfig(
            channels=16, channel_multipliers=(1, 2), num_res_blocks=1, norm_groups=8, attention_resolutions=()
        ),
        diffusion=DiffusionConfig(num_timesteps=50),
        sampling=SamplingConfig(steps=5, batch_size=4),
    )
    model = made_model(experiment)
    model_id = log(run, store, model)
    files = [path for path in (home / "mlartifacts").rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in {".pkl", ".pickle", ".pt", ".pth", ".pyc"}]
    environment = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    command = [sys.executable, "-c", LOAD, store.uri, model_id, str(tmp_path / "images.npy")]
    loaded = subprocess.run(
        command, cwd=tmp_path, env=environment, check=True, timeout=240, stdout=subprocess.PIPE, text=True
    )
    assert loaded.stdout.splitlines() == [f"INVALID_PARAMETER_VALUE {told}" for told in TOLD]
    images = np.load(tmp_path / "images.npy")
    assert images.dtype == np.uint8
    sampling = experiment.sampling.model_copy(update={"steps": 3})
    compute = Compute(torch.device("cpu"), "gloo", threads=1)
    with torch.no_grad():
        parts = list(Denoiser(model.diffusion, model.model, model.shape, sampling, 5, compute).generate(3))
    expected = torch.cat(parts)[:, 0].numpy()
    assert images.tolist() == expected.tolist()
    # its page says how to call it
    (page,) = (home / "mlartifacts").rglob("MLmodel")
    assert '"name": "n"' in page.read_text()
    (example,) = (home / "mlartifacts").rglob("serving_input_example.json")
    assert json.loads(example.read_text())["params"] == {"seed": 0, "steps": 0}


def test_a_network_of_the_users_own_goes_with_it_and_once(
    run: Run, store: TrackingSettings, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept_network.py").write_text(OWN_NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    model = made_model(Experiment(model=ModelConfig(type="kept_network:Own", arguments={"gain": 0.5})))
    log(run, store, model)
    (found,) = (home / "mlartifacts").rglob("kept_network.py")
    assert found.read_text() == OWN_NETWORK
    forget_receipts(run.folder)  # as if killed before these were written
    again = Tracker(run.folder, store)
    assert again.close()
    assert not again.undelivered() or [event["kind"] for event in again.undelivered()] == ["start"]
    assert '"refused"' not in (run.folder / "spool" / "events.jsonl").read_text()
    client = client_of(store)
    assert len(client.search_logged_models([client.get_run(run.mlflow_run_id).info.experiment_id])) == 1
