"""Our AdamW is torch's, bit for bit, and a training imports nothing that it does not need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.training.optimizer import AdamW

UNNEEDED = {"torch._dynamo", "sklearn", "matplotlib", "ray", "torchvision", "sympy"}
TRAINING = """
import sys
from pathlib import Path
from tests.kit.trainer import make_run, train
run = make_run(Path(sys.argv[1]), training={"steps": 2, "batch_size": 16})
assert train(str(run.folder)) == "finished"
print(*sorted(set(sys.argv[2:]) & sys.modules.keys()))
"""


@pytest.mark.parametrize("fused", [True, False])
def test_it_steps_as_torchs_does_bit_for_bit_also_from_a_saved_state(fused: bool) -> None:
    weights = []
    for kind in (torch.optim.AdamW, AdamW):
        generator = torch.Generator().manual_seed(0)
        model = nn.Linear(5, 3)
        for parameter in model.parameters():
            nn.init.normal_(parameter, generator=generator)
        optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.2, fused=fused)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=6)
        for step in range(6):
            if step == 3:  # go on with another optimizer, from the state of the first
                state = optimizer.state_dict()
                optimizer = kind(model.parameters(), lr=0.1, fused=fused)
                optimizer.load_state_dict(state)
                schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=6)
            optimizer.zero_grad()
            model(torch.randn(7, 5, generator=generator)).square().sum().backward()
            optimizer.step()
            schedule.step()
        assert not any(parameter.requires_grad is False for parameter in model.parameters())
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.slow
def test_a_training_imports_no_compiler_no_ray_and_nothing_for_pictures(home: Path) -> None:
    command = [sys.executable, "-c", TRAINING, str(home), *UNNEEDED]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
