"""Validation while training: its values by `ddpm` alone, its cost, and what it leaves as it is."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpm import BetaSchedule, GaussianDiffusion, estimate_bound, simple_losses
from pipeline.config import presets
from pipeline.config.experiment import DataConfig, Experiment, load_experiment, with_overrides
from pipeline.data.labels import NO_CLASSES, class_names_of
from pipeline.data.shards import Dataset
from pipeline.ingest.ingest import ensure_ingested, held_out_location
from pipeline.storage.run_checkpoints import RunCheckpoints
from pipeline.storage.runs import Run
from pipeline.training.models import build_model
from pipeline.training.randomness import rng_for
from pipeline.training.team import Team
from pipeline.training.trained import experiment_of
from pipeline.training.validation import Validation, plan_validation, rows_to_validate
from pipeline.worker.worker import Worker
from tests.kit.commands import Typed
from tests.kit.experiments import tiny_experiment, write_yaml
from tests.kit.forks import run_team
from tests.kit.trainer import final_digests, job_of, make_run, only_run
from tests.pipeline.worker.steps import CPU, experiment

STEPS = {
    "training": {"steps": 6, "batch_size": 16, "ema_decay": 0.9},
    "checkpoint": {"every_steps": 2, "every_minutes": None},
}
SHORT = STEPS | {"validation": {"holdout": 0.1, "every_steps": 3, "num_images": 40}}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Dataset]:
    rest = ensure_ingested(DataConfig(), tmp_path_factory.mktemp("parts"), holdout=0.1)
    return rest, Dataset.open(held_out_location(rest.location))


def run_on(parts: tuple[Dataset, Dataset], home: Path, **sections: Any) -> Run:
    """Return a new run of the tiny experiment on the rest."""
    rest, _ = parts
    run = make_run(home, datasets=home / "whole", **sections)
    record = run.folder / "run.json"
    content = json.loads(record.read_text())
    content["dataset"] |= {"path": str(rest.folder), "fingerprint": rest.manifest.fingerprint}
    record.write_text(json.dumps(content))
    return Run(run.folder)


class StopsAt:
    """A link that asks for a stop from some question on: one comes after each step, and one before each round of a validation."""

    def __init__(self, question: int | None) -> None:
        self.question, self.asked, self.losses = question, 0, set[float | None]()

    def publish(self, progress: dict[str, Any]) -> None:
        self.losses.add(progress.get("validation_loss"))

    def stop_requested(self) -> bool:
        self.asked += 1
        return self.question is not None and self.asked >= self.question


def train(run: Run, validation: Dataset | None, stop_at: int | None = None) -> tuple[str, StopsAt]:
    link = StopsAt(stop_at)
    folder = None if validation is None else validation.location
    return Worker(replace(job_of(run), validation_folder=folder), Team(), link).work(), link


def recorded(run: Run) -> dict[int, dict[str, float]]:
    """Return the recorded figures of validation by step; none may be recorded twice."""
    found: dict[int, dict[str, float]] = {}
    for line in (run.folder / "spool" / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event.get("kind") == "metrics" and "val/loss" in event["values"]:
            assert event["step"] not in found
            found[event["step"]] = event["values"]
    return found


@pytest.fixture(scope="module")
def validated(parts: tuple[Dataset, Dataset], tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = run_on(parts, tmp_path_factory.mktemp("validated"), **SHORT)
    outcome, link = train(run, parts[1])
    assert outcome == "finished"
    assert recorded(run)[6]["val/loss"] in link.losses
    return run


def test_values_are_those_that_ddpm_alone_computes(validated: Run, parts: tuple[Dataset, Dataset]) -> None:
    """L_simple and the bound of held-out and of training images, from the checkpoint's averaged weights: the same bytes."""
    chosen = experiment_of(validated)
    checkpoint = RunCheckpoints(validated).newest_verified().checkpoint
    assert checkpoint is not None
    torch.set_num_threads(1)
    model = build_model(chosen, (1, 8, 8))
    model.load_state_dict(checkpoint.tensors("ema")["ema"])
    model.eval()
    diffusion = GaussianDiffusion(BetaSchedule.named("linear", 1000))
    found = recorded(validated)
    assert sorted(found) == [3, 6]
    expected: dict[str, float] = {}
    for prefix, images in (("", parts[1]), ("train_", parts[0])):
        rows = np.arange(40) * len(images) // 40
        losses, bounds = [], []
        for chunk in (rows[:32], rows[32:]):
            x0 = (torch.from_numpy(images.read(chunk)).float() * 2 - 255) / 255
            generators = [rng_for("validation", chosen.seed, int(row)) for row in chunk]
            timesteps = (62, 187, 312, 437, 562, 687, 812, 937)
            losses.append(simple_losses(diffusion, model, x0, timesteps, generator=generators))
            bounds.append(estimate_bound(diffusion, model, x0, generator=generators, num_terms=4).total)
        by_t, bound = torch.cat(losses).mean(0), torch.cat(bounds)
        expected |= {f"val/{prefix}loss_t_{t}": float(x) for t, x in zip(timesteps, by_t, strict=True)}
        expected[f"val/{prefix}loss"] = float(by_t.mean())
        expected[f"val/{prefix}bound_estimate"] = float(bound.mean())
        expected[f"val/{prefix}bound_estimate_error"] = float(bound.std()) / math.sqrt(40)
    assert found[6].keys() == expected.keys()
    for name, value in expected.items():
        assert found[6][name] == pytest.approx(value, rel=1e-12), name


def test_weights_are_the_same_bytes_with_validation_and_without(
    tmp_path: Path, validated: Run, parts: tuple[Dataset, Dataset]
) -> None:
    run = run_on(parts, tmp_path, **SHORT)
    assert train(run, None)[0] == "finished"
    assert final_digests(run) == final_digests(validated)
    assert recorded(run) == {}


@pytest.mark.parametrize("stop_at", [3, 5])
def test_a_stop_does_not_wait_for_validation_and_the_resume_measures_what_it_left(
    tmp_path: Path, validated: Run, parts: tuple[Dataset, Dataset], stop_at: int
) -> None:
    """The third question comes after step 3, where validation is due; the fifth in the middle of it."""
    run = run_on(parts, tmp_path, **SHORT)
    assert train(run, parts[1], stop_at)[0] == "stopped"
    assert recorded(run) == {}
    assert train(run, parts[1])[0] == "finished"
    assert recorded(run) == recorded(validated)
    assert final_digests(run) == final_digests(validated)


def test_a_training_that_goes_on_measures_no_step_twice(
    tmp_path: Path, validated: Run, parts: tuple[Dataset, Dataset]
) -> None:
    """Its last step was measured and saved; lengthened, it resumes there."""
    run = run_on(parts, tmp_path, **SHORT | {"training": STEPS["training"] | {"steps": 3}})
    assert train(run, parts[1])[0] == "finished"
    longer = replace(job_of(run), experiment=validated.record.experiment, validation_folder=parts[1].location)
    assert Worker(longer, Team(), StopsAt(None)).work() == "finished"
    assert recorded(run) == recorded(validated)


def validate_as(rank: int, size: int, folder: str, rest: str, held_out: str) -> None:
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{size}", rank=rank, world_size=size)
    CPU.start()
    chosen = with_overrides(experiment(), ["validation.holdout=0.1", "validation.num_images=70"])
    validation = Validation(chosen, Dataset.open(held_out), Dataset.open(rest), NO_CLASSES)
    found = validation.measure(build_model(chosen, (1, 8, 8)), CPU, Team.join(60), lambda: False)
    Path(folder, f"{size}-{rank}.json").write_text(json.dumps(found))
    if size > 1:
        dist.destroy_process_group()


@pytest.mark.promise("P3")
@pytest.mark.slow
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.all)])
def test_several_workers_find_the_same_bytes(tmp_path: Path, parts: tuple[Dataset, Dataset], size: int) -> None:
    """Three chunks of each part, which four workers share unevenly."""
    places = [part.location for part in parts]
    validate_as(0, 1, str(tmp_path), *places)
    run_team(validate_as, (size, str(tmp_path), *places), size)
    found = [path.read_bytes() for path in tmp_path.glob("*-*.json")]
    assert len(found) == 1 + size
    assert len(set(found)) == 1
    assert json.loads(found[0])["bound_estimate"] > 0


class Listening(nn.Module):
    """A network that notes how many images it saw, and their labels."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.num_seen, self.labels = network, 0, []

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        assert not self.training
        self.num_seen += len(x)
        self.labels.append(y)
        out: Tensor = self.network(x, t, y)
        return out


def test_a_network_that_knows_classes_gets_those_of_the_images_and_the_plan_counts_its_calls(
    parts: tuple[Dataset, Dataset],
) -> None:
    rest, held_out = parts
    chosen = with_overrides(
        experiment(), ["validation.holdout=0.1", "validation.num_images=20", "model.class_conditional=true"]
    )
    names = class_names_of(rest)
    network = Listening(build_model(chosen, (1, 8, 8), num_classes=len(names)))
    found = Validation(chosen, held_out, rest, names).measure(network, CPU, Team(), lambda: False)
    assert found is not None
    plan = plan_validation(chosen)
    assert plan is not None
    assert network.num_seen == plan.calls == 2 * 20 * 13
    for part, images in enumerate((held_out, rest)):
        labels = images.labels(rows_to_validate(len(images), 20))
        assert labels is not None
        for told in network.labels[13 * part : 13 * (part + 1)]:
            assert told.tolist() == labels.tolist()


@pytest.mark.parametrize("name", presets.names("experiments"))
def test_presets_spend_at_most_two_percent_on_validation(name: str) -> None:
    chosen = load_experiment(presets.find("experiments", name))
    plan = plan_validation(chosen)
    if chosen.data.source not in ("mnist", "cifar10"):
        assert plan is None
        return
    assert chosen.validation.split == "test"
    assert plan is not None
    assert 0.01 < plan.share <= 0.02
    due = [step for step in range(1, chosen.training.steps + 1) if plan.is_due(step, step == chosen.training.steps)]
    assert len(due) == plan.times
    assert due[-1] == chosen.training.steps


def test_a_training_too_short_for_its_share_does_not_validate_unless_asked() -> None:
    short = with_overrides(Experiment(), ["validation.split=test", "training.steps=20"])
    plan = plan_validation(short)
    assert plan is not None
    assert (plan.every_steps, plan.times, plan.share) == (None, 0, 0.0)
    asked = plan_validation(with_overrides(short, ["validation.every_steps=8"]))
    assert asked is not None
    assert [step for step in range(1, 21) if asked.is_due(step, step == 20)] == [8, 16, 20]
    assert asked.times == 3
    # 256 images of each part, eight t, the decoder and four terms; a step is three passes of its 128 images
    assert asked.share == pytest.approx(3 * 2 * 256 * 13 / (3 * 128 * 20))


@pytest.mark.slow
def test_commands_validate_on_what_the_source_has_and_say_so(home: Path, typed: Typed) -> None:
    """The digits have no test split: a training goes on without validation; a fork of it holds images out, and may not change that."""
    asked = {"split": "test", "every_steps": 2, "num_images": 20}
    file = write_yaml(home / "e.yaml", tiny_experiment(training={"steps": 2}) | {"validation": asked})
    plan = json.loads(typed("train", file, "--dry-run", "--no-probe", "--json").stdout)
    assert (plan["validation"], plan["no_validation"]) == (None, "digits has no split 'test': leave the split out")
    done = typed("train", file)
    assert done.code == 0, done.stderr
    assert "warning: no validation: digits has no split 'test'" in done.stderr
    first = only_run(home)
    assert recorded(first) == {}
    held = ("-s", "validation.split=null", "-s", "validation.holdout=0.1")
    plan_text = typed("train", file, "--dry-run", "--no-probe", *held).stdout
    assert "every 2 steps, 1 in all, with 20 images held out (0.1 of all) and as many trained on" in plan_text
    forked = typed("resume", first.id, "--fork", *held)
    assert forked.code == 0, forked.stderr
    (run,) = (run for run in Run.all(home) if run.id != first.id)
    assert sorted(recorded(run)) == [2]
    assert "validation at step 2: loss " in run.log_path.read_text()
    assert Dataset.open(held_out_location(run.record.dataset["path"])).manifest.name == "digits-holdout"
    short = typed("resume", run.id, "-s", "training.steps=3", "-s", "validation.every_steps=null")
    assert (
        "warning: no validation: one with 20 images costs 520 network calls, more than 2% of so short" in short.stderr
    )
    refused = typed("resume", run.id, "-s", "validation.holdout=0.2", "-s", "training.steps=9")
    assert refused.code != 0
    assert "validation.holdout: 0.1 -> 0.2" in refused.stderr
