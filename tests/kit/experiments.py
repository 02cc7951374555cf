"""Tiny experiments, and a network of a user's own that is as slow as a test needs to act in the middle of its work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "channels": 16,
        "channel_multipliers": [1, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [4],
        "norm_groups": 4,
        "dropout": 0.2,
    },
    "training": {"steps": 30, "batch_size": 16, "warmup_steps": 5, "ema_decay": 0.9},
    "checkpoint": {"every_steps": 4, "every_minutes": None},
    "logging": {"every_steps": 3, "grid_every_steps": None},
}
SAVED_EVERY = 5  # steps, by commands
# one thread each: bit-exactness is promised for an equal number of them
TWO_WORKERS = "workers: 2\nresources_per_worker: {CPU: 1}\nthreads_per_worker: 1\n"
# slow to train; and while a file `hold` is beside it, it samples no more after so many calls: until then a test acts
SLOW_NETWORK = """
import time
from pathlib import Path
import torch
from torch import nn

class Slow(nn.Module):
    def __init__(
        self,
        training_s: float = 0.0,
        hold_after: int = 0,
        dropout: float = 0.0,
        hang_at: int | None = None,
    ) -> None:
        super().__init__()
        self.net, self.drop = nn.Conv2d(1, 1, 3, padding=1), nn.Dropout(dropout)
        self.training_s, self.hold_after, self.hang_at = training_s, hold_after, hang_at
        self.calls = self.sampled = 0

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        time.sleep(self.training_s * self.training)
        self.sampled += not self.training
        while self.sampled > self.hold_after and Path(__file__).with_name("hold").exists():
            time.sleep(0.01)
        self.calls += self.training
        if self.calls == self.hang_at:
            time.sleep(600)
        return self.drop(self.net(x))
"""


def tiny_experiment(**sections: dict[str, Any]) -> dict[str, Any]:
    """Return the tiny experiment as commands train it: 40 steps, each logged, no scores; `sections` change single settings."""
    base = TINY | {"sampling": {"steps": 2}, "evaluation": {"enabled": False}}
    ours = {"training": {"steps": 40}, "checkpoint": {"every_steps": SAVED_EVERY}, "logging": {"every_steps": 1}}
    for changes in (ours, sections):
        base |= {name: base.get(name, {}) | section for name, section in changes.items()}
    return base


def write_yaml(path: Path, content: dict[str, Any]) -> str:
    """Write a file of settings; return its name."""
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path.name


def slow_model(home: Path, **arguments: Any) -> dict[str, Any]:
    """Write the slow network's module into a folder; return the section `model` that names it."""
    (home / "slow_network.py").write_text(SLOW_NETWORK)
    return {"type": "slow_network:Slow", "arguments": arguments}


def slow_experiment(home: Path, *, pause: float = 0.15, steps: int = 40, dropout: float = 0.2, **arguments: Any) -> str:
    """Write the tiny experiment with a network that takes `pause` seconds for a step of training; return its file's name."""
    model = slow_model(home, training_s=pause, dropout=dropout, **arguments)
    return write_yaml(home / "slow.yaml", tiny_experiment(training={"steps": steps}) | {"model": model})
