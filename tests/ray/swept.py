"""A home with tiny experiments and sweeps, and a user's shell in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import IN_PROCESS_ONLY, type_here
from tests.pipeline.training.trainer import SLOW_NETWORK

TINY = """
name: tiny
model: {channels: 16, channel_multipliers: [1, 2], num_res_blocks: 1, attention_resolutions: [], norm_groups: 4, dropout: 0.0}
diffusion: {num_timesteps: 100}
training: {steps: 60, batch_size: 16, warmup_steps: 5, ema_decay: 0.9}
checkpoint: {every_steps: 10, every_minutes: null}
logging: {every_steps: 10, grid_every_steps: null}
sampling: {sampler: ddim, steps: 4}
evaluation: {extractor: classifier, num_images: 128}
"""
GRID = """
name: grid
base: tiny.yaml
space:
  diffusion.schedule: [linear, cosine]
  diffusion.num_timesteps: [2, 50, 100]
budget: {steps: 20}
metric: fid
more_network_calls: [2]
overrides: {}
"""
RACE = """
name: race
base: tiny.yaml
overrides: {training.grad_clip: null}
space:
  training.learning_rate: [3.0e-3, 1.0e-7, 2.0e-7, 1.0e+30]
budget: {steps: 240}
metric: kid
early_stopping: {rungs: 1, reduction_factor: 2, num_images: 64}
"""


def prepare(home: Path) -> None:
    (home / "tiny.yaml").write_text(TINY)
    (home / "grid.yaml").write_text(GRID)
    (home / "race.yaml").write_text(RACE)
    (home / "slow_network.py").write_text(SLOW_NETWORK)
    lines = [line for line in TINY.splitlines() if not line.startswith("model:")]
    (home / "slow.yaml").write_text(
        "\n".join([*lines, "model: {type: 'slow_network:Slow', arguments: {training_s: 0.3}}"])
    )


class Shell:
    """A user's shell in a home of its own that tests of this module share."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {"DDPM_PIPE_HOME": str(home)}

    def process_environment(self) -> dict[str, str]:
        """The environment of a process that a user starts here."""
        plain = {name: value for name, value in os.environ.items() if name not in IN_PROCESS_ONLY}
        return plain | self.environment

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(Path(sys.executable).with_name("ddpm-pipe")), *arguments],
            cwd=self.home,
            env=self.process_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Type a command in this process, on the Ray that tests share: what is not about the command's own process."""
        return type_here(self.home, *arguments, env=self.environment)
