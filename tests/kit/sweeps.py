"""A home with tiny experiments and sweeps."""

from __future__ import annotations

from pathlib import Path

from tests.kit.experiments import slow_model, tiny_experiment, write_yaml

TINY = tiny_experiment(
    model={"attention_resolutions": [], "dropout": 0.0},
    diffusion={"num_timesteps": 100},
    training={"steps": 60},
    checkpoint={"every_steps": 10},
    logging={"every_steps": 10},
    sampling={"sampler": "ddim", "steps": 4},
) | {"evaluation": {"extractor": "classifier", "num_images": 128}}
GRID = {
    "name": "grid",
    "base": "tiny.yaml",
    "space": {"diffusion.schedule": ["linear", "cosine"], "diffusion.num_timesteps": [2, 50, 100]},
    "budget": {"steps": 20},
    "metric": "fid",
    "more_network_calls": [2],
    "overrides": {},
}
RACE = {
    "name": "race",
    "base": "tiny.yaml",
    "overrides": {"training.grad_clip": None},
    "space": {"training.learning_rate": [3.0e-3, 1.0e-7, 2.0e-7, 1.0e30]},
    "budget": {"steps": 240},
    "metric": "kid",
    "early_stopping": {"rungs": 1, "reduction_factor": 2, "num_images": 64},
}


def prepare(home: Path) -> None:
    """Write the files."""
    write_yaml(home / "tiny.yaml", TINY)
    write_yaml(home / "grid.yaml", GRID)
    write_yaml(home / "race.yaml", RACE)
    write_yaml(home / "slow.yaml", TINY | {"model": slow_model(home, training_s=0.3)})
