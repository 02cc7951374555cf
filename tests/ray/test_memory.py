"""A worker that the kernel kills for lack of memory is told from one that was killed otherwise: a real limit, and the real OOM killer."""

from __future__ import annotations

import pytest

from tests.kit.commands import PROGRAM, told
from tests.kit.experiments import tiny_experiment, write_yaml
from tests.kit.memory_limit import memory_limit

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LIMIT = 3 * 2**30
GREEDY = """
import torch
from torch import nn

class Greedy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.kept = nn.Conv2d(1, 1, 3, padding=1), []

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.kept.append(torch.ones(2**27))  # half a gigabyte at each step
        return self.net(x)
"""


@pytest.mark.fault(17)
def test_a_worker_without_memory_is_reported_as_such_with_what_to_lower(home, shell):
    (home / "greedy.py").write_text(GREEDY)
    write_yaml(home / "greedy.yaml", tiny_experiment() | {"model": {"type": "greedy:Greedy"}})
    with memory_limit(LIMIT) as join:
        code, _, stderr = shell.launch("sh", "-c", f"{join} && exec {PROGRAM} train greedy.yaml --isolated").end(300)
    assert code == 8, stderr
    last = told(stderr)
    assert "killed by the system: out of memory" in last
    assert "training.micro_batch_size" in last
