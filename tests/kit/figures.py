"""`python -m tests.kit.figures HOME`: train and evaluate a tiny run in a home of its own; print all that came out."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config.cluster_profile import Profile
from pipeline.console import Console
from pipeline.metrics.fid import Moments, frechet_distance, kid
from pipeline.metrics.prdc import prdc
from pipeline.runs.evaluate import ScoreRequest, score_run
from pipeline.storage.home import features_dir
from pipeline.training.trained import profile_of
from tests.kit import trainer
from tests.kit.experiments import TINY

SECTIONS: dict[str, Any] = {
    "diffusion": {"schedule": "cosine", "num_timesteps": 20},
    "training": TINY["training"] | {"steps": 4},
    "sampling": {"sampler": "ddim", "steps": 2, "batch_size": 64},
    "evaluation": {"metrics": ["fid", "kid", "is", "prdc", "bpd"], "extractor": "classifier"},
}


def figures(home: Path) -> dict[str, Any]:
    """Return losses, weights and scores of a run of two threads, what was kept of real images, and distances of wide features."""
    run = trainer.make_run(home, profile=Profile(threads_per_worker=2), **SECTIONS)
    assert trainer.train(str(run.folder)) == "finished"
    found = score_run(run, ScoreRequest(num_images=128), profile_of(run), Console(io.StringIO()))
    assert found.scored is not None
    assert found.measured is not None
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 2048)), rng.normal(0.1, 1.1, size=(300, 2048))
    wide = Moments.of(x), Moments.of(y)
    scores = found.to_json()
    del scores["model"]["run"]  # another name in each home
    return {
        "losses": trainer.logged_losses(run),
        "weights": trainer.final_digests(run),
        "scores": scores,
        "images": _digest(found.scored.preview),
        "bits": _digest(found.measured.bound.total),
        "kept": {path.name: _digest(path.read_bytes()) for path in sorted(features_dir(home).glob("*.safetensors"))},
        "wide": {
            "moments": [_digest(part.scatter) for part in wide],
            "fid": frechet_distance(*wide),
            "kid": list(vars(kid(x, y, num_subsets=4, subset_size=100)).values()),
            "prdc": prdc(x, y),
        },
        "threads": torch.get_num_threads(),
    }


def _digest(data: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(data).tobytes() if not isinstance(data, bytes) else data).hexdigest()


if __name__ == "__main__":
    print(json.dumps(figures(Path(sys.argv[1])), indent=1))
