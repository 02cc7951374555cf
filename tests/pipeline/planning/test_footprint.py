"""The memory of a training worker: the estimate against what real steps keep, and advice where it does not fit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm import UNet
from pipeline.config.experiment import Experiment, Precision, experiment_from
from pipeline.planning import footprint
from pipeline.planning.footprint import WorkerMemory, _fake_step
from pipeline.sampling.memory import Alive
from pipeline.storage.run_checkpoints import RunCheckpoints
from pipeline.storage.runs import Run
from pipeline.training.models import build_model, build_objective
from tests.kit.experiments import TINY, tiny_experiment, write_yaml

SHAPE = (1, 16, 16)


def experiment(**training: Any) -> Experiment:
    model = TINY["model"] | {"attention_resolutions": [8], "class_conditional": True, "dropout": 0.1}
    return experiment_from({"model": model, "training": training})


def real_step(chosen: Experiment, images: int, half: bool) -> int:
    """Return the most bytes that live at once in a real step."""
    meta = build_model(chosen, SHAPE, device="meta", num_classes=10)
    objective = build_objective(chosen)
    numbers = torch.zeros(images, dtype=torch.int64)
    with Alive() as alive:
        model = meta.to_empty(device="cpu").train()
        x0, eps = torch.empty(images, *SHAPE), torch.empty(images, *SHAPE)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = objective(partial(model, y=numbers, keys=numbers), x0, numbers, eps)
            with torch.autocast("cpu", enabled=False):
                losses.sum().backward()  # type: ignore[no-untyped-call]
    most: int = alive.most
    return most


@pytest.mark.parametrize(("levels", "half"), [(0, False), (2, False), (0, True)])
def test_a_step_without_content_takes_the_bytes_of_a_real_one(levels: int, half: bool) -> None:
    chosen = experiment(activation_checkpointing=levels)
    estimated, _, parameters = _fake_step(chosen, SHAPE, 16, half)
    assert estimated == pytest.approx(real_step(chosen, 16, half), rel=0.1)
    assert parameters == sum(p.numel() for p in build_model(chosen, SHAPE, num_classes=10).parameters())


def test_each_setting_that_lowers_the_memory_is_advised_as_far_as_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "RUNTIME_BYTES", 0)
    asked = WorkerMemory(experiment(), SHAPE, 64, Precision.FP32, gpu=True)
    now, again, fewer = asked.footprint(), asked.footprint(levels=2), asked.footprint(images=16)
    assert now is not None
    assert again is not None
    assert fewer is not None
    assert again.peak_bytes < now.peak_bytes / 2
    # all but the last layer of each block, which nothing needs again: between a tenth of a step and a third
    assert 1.1 < again.flops / now.flops < 4 / 3
    free = int(fewer.peak_bytes / footprint.NEARLY_ALL) + 1000
    short = WorkerMemory(experiment(), SHAPE, 64, Precision.FP32, gpu=True, free_bytes=free)
    told = short.advice()
    assert "for 64 images at once and has" in told
    assert "-s training.micro_batch_size=16 (" in told
    assert "images at once; use -s training.micro_batch_size=32 (" in asked.advice()
    assert "-s training.activation_checkpointing=1 (" in asked.advice()
    hopeless = WorkerMemory(experiment(), SHAPE, 64, Precision.FP32, gpu=True, free_bytes=1000)
    assert "use several of -s training.micro_batch_size=1, -s training.activation_checkpointing=2" in hopeless.advice()


@pytest.mark.fault(17)
@pytest.mark.parametrize("raises", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), None])
def test_out_of_memory_ends_in_one_line_with_numbers_and_a_run_that_resumes(
    home: Path, typed: Any, monkeypatch: pytest.MonkeyPatch, raises: Exception | None
) -> None:
    """On a GPU, by its error; on a CPU really, for more memory than a machine can have."""
    write_yaml(home / "tiny.yaml", tiny_experiment(training={"steps": 8}, checkpoint={"every_steps": 3}))
    forward, calls = UNet.forward, 0

    def full(self: UNet, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += self.training
        if calls == 5:
            calls += 1
            if raises is not None:
                raise raises
            torch.empty(2**50)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(UNet, "forward", full)
    code, _, stderr = typed("train", "tiny.yaml")
    assert code == 8
    last = stderr.strip().splitlines()[-1]
    assert "failed after step 3: out of memory (" in last
    assert "a worker takes about " in last
    assert "-s training.micro_batch_size=8 (" in last
    assert "-s training.activation_checkpointing=" in last
    code, _, stderr = typed("resume", "latest", "-s", "training.activation_checkpointing=1")
    assert code == 0, stderr
    assert RunCheckpoints(Run.find(home, "latest")).committed()[0].step == 8
