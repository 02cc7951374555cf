"""A class-conditional model draws the digits that are asked for: the shipped classifier, which it never saw, agrees."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.config import presets
from pipeline.config.experiment import DataConfig, experiment_from, load_experiment, with_overrides
from pipeline.data.labels import ClassNames, class_name, class_names_of, labels_of
from pipeline.data.order import Order
from pipeline.data.shards import Dataset
from pipeline.errors import UsageError
from pipeline.ingest.ingest import ensure_ingested
from pipeline.metrics import scoring
from pipeline.runs.evaluate import ScoreRequest
from pipeline.runs.grid import parse_grid
from pipeline.sampling.generation import Denoiser
from pipeline.storage.retention import Retention
from pipeline.storage.run_checkpoints import Saver
from pipeline.storage.runs import Run
from pipeline.sweeps.config import axis_of, load_sweep
from pipeline.training.batches import training_batches
from pipeline.training.loop import TrainState, fit
from pipeline.training.models import build_diffusion, build_model, build_objective
from tests.kit import trainer
from tests.kit.experiments import TINY
from tests.pipeline.worker.steps import CPU

DIGITS = tuple("0123456789")


@pytest.fixture(scope="module")
def denoiser(dataset: Dataset) -> Denoiser:
    """The digits preset for 300 steps, told the labels; about half a minute."""
    torch.set_num_threads(1)
    settings = ("model.class_conditional=true", "diffusion.prediction=v", "training.ema_decay=0.98")
    experiment = with_overrides(load_experiment(presets.find("experiments", "digits")), settings)
    diffusion = build_diffusion(experiment)
    model = build_model(experiment, dataset.manifest.shape, num_classes=10)
    train_state = TrainState.create(model, experiment.training, diffusion.num_timesteps, CPU)
    order = Order(dataset.manifest.row_groups, 0, 16, experiment.training.batch_size, 65_536)
    batches = training_batches(dataset, order, range(16), 0, 0)
    objective = build_objective(experiment)
    for result in fit(train_state, model, objective, batches, experiment.training, CPU, seed=0, null_class=10):
        if result.step == 300:
            break
    train_state.ema.copy_to(model)
    sampling = experiment.sampling.model_copy(update={"sampler": "dpm_solver", "steps": 20})
    return Denoiser(diffusion, model, dataset.manifest.shape, sampling, 0, CPU, class_names_of(dataset))


def decisions(dataset: Dataset, denoiser: Denoiser, tmp_path, **sampling: object) -> np.ndarray:
    """The classes that the classifier sees in 100 generated images."""
    chosen = replace(denoiser, sampling=denoiser.sampling.model_copy(update=sampling))
    images = torch.cat(list(chosen.generate(100))).numpy()
    logits = scoring.choose_extractor(dataset, tmp_path, kind="classifier")(images).logits
    assert logits is not None
    return logits.argmax(1)


@pytest.mark.slow
def test_the_digits_that_are_asked_for_come(tmp_path, dataset, denoiser):
    seen = decisions(dataset, denoiser, tmp_path, guidance_scale=2.0)
    assert (seen == np.arange(100) % 10).mean() > 0.95  # balanced: image i is of class i mod 10
    sevens = decisions(dataset, denoiser, tmp_path, guidance_scale=2.0, labels="7")
    assert (sevens == 7).mean() > 0.95


@pytest.mark.slow
def test_without_a_label_every_digit_comes(tmp_path, dataset, denoiser):
    seen = decisions(dataset, denoiser, tmp_path, labels="#none")
    assert len(np.unique(seen)) >= 8
    assert (seen == np.arange(100) % 10).mean() < 0.3


@pytest.mark.slow
def test_guidance_makes_them_more_alike(dataset, denoiser):
    """Stronger guidance trades variety for fidelity (Ho & Salimans 2022): the sevens lie closer together."""

    def spread(scale: float) -> float:
        sampling = denoiser.sampling.model_copy(update={"labels": "7", "guidance_scale": scale})
        images = torch.cat(list(replace(denoiser, sampling=sampling).generate(100))).float()
        return float(images.var(0).mean())

    assert spread(4.0) < 0.9 * spread(1.0)


def test_labels_are_functions_of_the_index():
    assert labels_of(range(8, 13), "#balanced", DIGITS).tolist() == [8, 9, 0, 1, 2]
    assert labels_of(range(3), "7", DIGITS).tolist() == [7, 7, 7]
    assert labels_of(range(2), 7, DIGITS).tolist() == [7, 7]
    assert labels_of(range(2), "#none", DIGITS).tolist() == [10, 10]
    assert labels_of(range(2), "dog", ("cat", "dog")).tolist() == [1, 1]
    assert class_name("#1", ("cat", "dog")) == class_name("dog", ("cat", "dog")) == "dog"
    turned = ("2", "1", "0")  # a number that is a name names that class, however it is typed
    assert labels_of(range(1), 2, turned).tolist() == labels_of(range(1), "2", turned).tolist() == [0]
    assert class_name(2, turned) == class_name("2", turned) == "2"
    for wrong in ("dgo", "1", 0, -1, "#2", "#-1", "#", "##dog", "#\u0661"):
        with pytest.raises(UsageError, match="by name or number, such as '#0': cat, dog"):
            class_name(wrong, ("cat", "dog"))


def test_no_name_is_taken_for_a_word_of_the_program():
    names = ("none", "balanced", "#none", "#2", "010", "no")
    written = {name: class_name(f"#{number}", names) for number, name in enumerate(names)}
    assert [labels_of(range(1), label, names).item() for label in written.values()] == list(range(6))
    assert (written["none"], written["#none"], written["#2"]) == ("none", "##none", "##2")
    assert labels_of(range(2), "#none", names).tolist() == [6, 6]
    assert labels_of(range(3), "#balanced", names).tolist() == [0, 1, 2]
    assert {class_name(word, DIGITS) for word in ("none", "#none")} == {"#none"}  # no class is called so


def test_classes_without_images_are_neither_drawn_nor_balanced():
    names = ClassNames(("ant", "bee", "cat", "dog"), untrained=(0, 2))
    assert labels_of(range(1, 6), "#balanced", names).tolist() == [3, 1, 3, 1, 3]
    assert labels_of(range(1), "#none", names).tolist() == [4]  # the network has room for all four
    assert labels_of(range(1), "dog", names).tolist() == [3]
    for label in ("cat", "#2"):
        with pytest.raises(UsageError, match=r"class 'cat' has no training images. Give one of: bee, dog"):
            labels_of(range(1), label, names)
    assert ClassNames.from_state(json.loads(json.dumps(names.to_state()))).untrained == names.untrained
    assert copy.deepcopy(names).untrained == names.untrained


@pytest.mark.parametrize("label", ["010", "no", "null", "1e3", "~", "2024-01-01", "0x1F", "007"])
def test_class_names_are_text_wherever_they_are_written(tmp_path, label: str):
    """YAML 1.1 reads these as 8, false, null, 1000.0, null, a date, 31 and 7."""
    preset = load_experiment(presets.find("experiments", "digits"))
    assert with_overrides(preset, [f"sampling.labels={label}"]).sampling.labels == label
    assert with_overrides(preset, [f"sampling.labels='{label}'"]).sampling.labels == label
    file = tmp_path / "own.yaml"
    file.write_text(f"sampling:\n  labels: {label}\n")
    assert load_experiment(file).sampling.labels == label
    assert axis_of(f"sampling.labels={label},#3") == ("sampling.labels", {"grid": [label, "#3"]})
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        f"base: digits\noverrides: {{sampling.labels: {label}}}\nspace:\n  sampling.labels: [{label}]\nbudget: {{steps: 4}}\n"
    )
    found = load_sweep(str(sweep), (), {})
    assert (found.overrides["sampling.labels"], found.space["sampling.labels"].values) == (label, (label,))
    _, (point,) = parse_grid(f"labels={label}", ScoreRequest())
    assert point.labels == label


def test_a_true_that_was_read_is_no_class():
    with pytest.raises(UsageError, match=r"sampling\.labels: got True"):
        experiment_from({"sampling": {"labels": True}})


def test_images_without_labels_cannot_train_classes(tmp_path):
    np.savez(tmp_path / "images.npz", images=np.zeros((8, 8, 8), np.uint8))
    unlabelled = ensure_ingested(DataConfig(source=str(tmp_path / "images.npz")), tmp_path / "datasets")
    with pytest.raises(UsageError, match="have no labels"):
        class_names_of(unlabelled)


@pytest.mark.parametrize(
    ("known", "told"), [(DIGITS[:2] + DIGITS[:1:-1], "class 2 of .* is '9', .* it is '2'"), (DIGITS[:9], "it is '9'")]
)
def test_a_fork_onto_classes_that_have_other_numbers_is_refused(typed, home, known: tuple[str, ...], told: str):
    """The rows of an embedding are classes by number: a folder's are sorted by name, those of other sets are not."""
    run = trainer.make_run(home, model=TINY["model"] | {"class_conditional": True})
    state = {"step": 0, "class_names": list(known)}
    Saver(run, run.next_attempt(), Retention(newest=1)).save(0, {"model": {}, "ema": {}}, state, wait=True)
    code, out, err = typed("resume", run.id, "--fork")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert re.search(told, err)
    assert [r.id for r in Run.all(home)] == [run.id]
