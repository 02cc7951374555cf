"""Bits/dim over a split: closed forms, independence of how the images are cut and joined, and the command."""

from __future__ import annotations

import csv
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ddpm import BetaSchedule, BitsPerDim, GaussianDiffusion, Model, bits_per_dim
from pipeline.config.cluster_profile import Profile
from pipeline.data.images import to_float
from pipeline.data.labels import model_labels
from pipeline.errors import UsageError
from pipeline.metrics.bound import Bound, Curve, Likelihood, join, mean_and_error, rows_to_measure
from pipeline.metrics.bound_report import Measured, curves_figure, write_measured
from pipeline.metrics.metric_identity import BoundIdentity
from pipeline.storage.tensor_file import Arrays, unpack
from pipeline.training.chunks import ChunkStore, Task, compute
from pipeline.training.device import sampling_compute
from pipeline.training.randomness import image_generators
from tests.kit import trainer
from tests.kit.array_set import ArraySet
from tests.kit.closed_forms import ignorant, point_mass
from tests.kit.commands import Typed
from tests.kit.drawings import holds, points_of

T = 20


class Network(nn.Module):
    """A closed form as a network."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert not self.training
        return self.model(x, t)


def likelihood(diffusion: GaussianDiffusion, model: Model) -> Likelihood:
    return Likelihood(
        partial(bits_per_dim, diffusion), Network(model), (), sampling_compute(Profile(threads_per_worker=1))
    )


def images(count: int, seed: int = 0) -> ArraySet:
    return ArraySet(np.random.default_rng(seed).integers(0, 256, (count, 1, 4, 4), dtype=np.uint8))


@pytest.mark.parametrize(
    ("prediction", "variance"), [("eps", "fixed_large"), ("v", "fixed_small"), ("x0", "learned_range")]
)
def test_a_bound_is_the_cores_whatever_the_chunks(prediction: str, variance: str) -> None:
    """Every image by itself, with the noise of its row, against chunks of 3 and of all; the last chunk is a part."""
    diffusion = GaussianDiffusion(BetaSchedule.named("cosine", T), prediction, variance)
    model = ignorant(1, 2 if variance == "learned_range" else 1)
    data, rows = images(7), np.arange(7)
    each = [
        bits_per_dim(
            diffusion,
            model,
            to_float(torch.from_numpy(data.images[i : i + 1])),
            generator=image_generators(5, range(i, i + 1), "likelihood"),
        )
        for i in range(7)
    ]
    prior, terms, x0_mse = (torch.cat([getattr(e, name) for e in each]) for name in ("prior", "terms", "x0_mse"))
    expected = BitsPerDim(prior, terms, x0_mse, each[0].timesteps)
    measure = likelihood(diffusion, model)
    whole = measure.bound(data, rows, 5)
    cut = join(measure.bound(data, rows[i : i + 3], 5) for i in (0, 3, 6))
    for found in (whole, cut):
        np.testing.assert_allclose(found.total, expected.total.numpy(), rtol=1e-5)
        np.testing.assert_allclose(found.prior + found.divergences + found.decoder, found.total, rtol=1e-15)
        np.testing.assert_allclose(found.decoder, expected.decoder.numpy(), rtol=1e-5)
        np.testing.assert_allclose(found.terms.mean, expected.terms.mean(0).numpy(), rtol=1e-5)
        np.testing.assert_allclose(
            found.terms.standard_error, expected.terms.std(0).numpy() / math.sqrt(7), rtol=1e-4, atol=1e-12
        )
        for ours, theirs in zip(found.rate_distortion(), expected.rate_distortion(), strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5)
    assert not np.allclose(measure.bound(data, rows, 6).total, whole.total)


def test_a_known_image_costs_its_decoder_and_the_prior() -> None:
    """Point mass, fixed_small: nothing is left but L_T, by hand, and L_0, whose bin is centred on the mean."""
    schedule = BetaSchedule.named("cosine", T)
    level = 25
    mu = level / 127.5 - 1
    diffusion = GaussianDiffusion(schedule, "x0", "fixed_small")
    data = ArraySet(np.full((5, 1, 3, 3), level, np.uint8))
    found = likelihood(diffusion, point_mass(diffusion, mu)).bound(data, np.arange(5), 0)
    mass = math.erf(1 / 255 / math.sqrt(2 * float(schedule.posterior_variance[1])))
    abar = float(schedule.alphas_cumprod[-1])
    prior = 0.5 * (abar * mu**2 + (1 - abar) - 1 - math.log(1 - abar)) / math.log(2)
    np.testing.assert_allclose(found.decoder, -math.log2(mass), rtol=1e-5)
    np.testing.assert_allclose(found.prior, prior, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(found.divergences, 0, atol=1e-9)


@pytest.mark.oracle(10)
@given(cut=st.integers(1, 19), seed=st.integers(0, 2**16), offset=st.sampled_from([0.0, 1e4]))
def test_oracle_10_moments_of_parts_are_those_of_the_whole(cut: int, seed: int, offset: float) -> None:
    values = np.random.default_rng(seed).normal(size=(20, 4)) + offset
    merged = Curve.of(values[:cut]).merge(Curve.of(values[cut:]))
    np.testing.assert_allclose(merged.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.standard_error, values.std(0, ddof=1) / math.sqrt(20), rtol=1e-9)
    mean, error = mean_and_error(values[:, 0])
    assert mean == pytest.approx(values[:, 0].mean(), rel=1e-12)
    assert error == pytest.approx(values[:, 0].std(ddof=1) / math.sqrt(20), rel=1e-9)


class Measuring(Task):
    """Chunks of five rows of 13."""

    def __init__(self, measure: Likelihood, data: ArraySet) -> None:
        self.measure, self.data, self.computed = measure, data, 0

    def start(self, here: object) -> None:
        pass

    def __call__(self, indices: range) -> Arrays:
        self.computed += 1
        return self.measure.bound(self.data, np.arange(13)[indices.start : indices.stop], 1).to_arrays()


def test_chunks_computed_in_any_order_and_at_any_time_give_the_same_bytes(tmp_path: Path) -> None:
    diffusion = GaussianDiffusion(BetaSchedule.named("cosine", T), "eps")
    task = Measuring(likelihood(diffusion, ignorant()), images(13))

    def backwards(task, chunks):
        for number, indices in reversed(list(chunks.items())):
            yield number, task(indices)

    def interrupted(task, chunks):
        number, indices = next(iter(chunks.items()))
        yield number, task(indices)
        raise KeyboardInterrupt

    straight = join(map(Bound.from_arrays, compute(task, 13, 5, ChunkStore(tmp_path / "a", {}))))
    turned = join(map(Bound.from_arrays, compute(task, 13, 5, ChunkStore(tmp_path / "b", {}), backwards)))
    with pytest.raises(KeyboardInterrupt):
        list(compute(task, 13, 5, ChunkStore(tmp_path / "c", {}), interrupted))
    before = task.computed
    went_on = join(map(Bound.from_arrays, compute(task, 13, 5, ChunkStore(tmp_path / "c", {}))))
    assert task.computed == before + 2  # the first of three was kept
    assert len(straight.total) == 13
    for other in (turned, went_on):
        for name, array in straight.to_arrays().items():
            assert array.tobytes() == other.to_arrays()[name].tobytes(), name


class Told(nn.Module):
    """A network that sees nothing but the class it is told, each by its own number."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return (y.to(x.dtype) / 4).view(-1, 1, 1, 1).expand_as(x)


def test_a_model_is_told_classes_by_name_whatever_numbers_they_have() -> None:
    """Another split's numbers are its own: of the same images the same bound, and not that of other classes."""
    compute = sampling_compute(Profile(threads_per_worker=1))
    measure = partial(bits_per_dim, GaussianDiffusion(BetaSchedule.named("cosine", T)))
    model = Likelihood(measure, Told(), ("cat", "dog", "owl"), compute)
    pixels, classes = images(6).images, np.array([0, 1, 2, 2, 1, 0])
    rows = np.arange(6)
    own = model.bound(ArraySet(pixels, classes, class_names=("cat", "dog", "owl")), rows, 0)
    turned = model.bound(ArraySet(pixels, 2 - classes, class_names=("owl", "dog", "cat")), rows, 0)
    fewer = model.bound(ArraySet(pixels[1:3], np.array([0, 1]), class_names=("dog", "owl")), np.arange(2), 0)
    wrong = model.bound(ArraySet(pixels, 2 - classes, class_names=("cat", "dog", "owl")), rows, 0)
    assert own.total.tobytes() == turned.total.tobytes() != wrong.total.tobytes()
    assert len(fewer.total) == 2


@pytest.mark.parametrize(
    ("labels", "names", "told"),
    [
        (None, None, "have no labels"),
        ([0, -1, 2, -1], ("cat", "dog", "owl"), "lack a label in 2 cases"),
        ([0, 1, 1, 0], ("cat", "dogs"), "class 'dogs' (did you mean 'dog'?)"),
        ([0, 1, 1, 0], None, "class '0'"),
    ],
)
def test_images_whose_class_the_model_cannot_be_told_are_refused(labels: Any, names: Any, told: str) -> None:
    given = None if labels is None else np.array(labels)
    data = ArraySet(images(4).images, given, "mine", names)
    with pytest.raises(UsageError) as refused:
        model_labels(data, np.arange(4), ("cat", "dog", "owl"))
    message = str(refused.value)
    assert told in message
    assert "images of mine" in message
    assert "\n" not in message


def test_a_cap_takes_the_same_images_from_any_copy_of_the_set() -> None:
    data = images(40)
    other = data.permuted(3)
    chosen, again = rows_to_measure(data, 12), rows_to_measure(other, 12)
    assert len(set(chosen.tolist())) == 12
    assert list(chosen) == sorted(chosen)
    assert {data.images[i].tobytes() for i in chosen} == {other.images[i].tobytes() for i in again}
    assert rows_to_measure(data, None).tolist() == rows_to_measure(data, 40).tolist() == list(range(40))


def test_what_is_written_says_all_of_it(tmp_path: Path) -> None:
    diffusion = GaussianDiffusion(BetaSchedule.named("cosine", T), "eps")
    bound = likelihood(diffusion, ignorant()).bound(images(6), np.arange(6), 0)
    identity = BoundIdentity("bits_per_dim", "ab" * 32, "test", 6, 9, "ema", "T = 20, x0 clipped", 0, 6)
    measured = Measured.of(bound, identity)
    paths = {path.name: path for path in write_measured(measured, tmp_path / "bound", {})}
    told = json.loads(paths["scores.json"].read_text())
    assert told["values"]["bits_per_dim_test_n6"] == pytest.approx(bound.total.mean())
    parts = [told["values"][f"bits_per_dim_{part}_test_n6"] for part in ("prior", "divergences", "decoder")]
    assert sum(parts) == pytest.approx(bound.total.mean())
    assert told["spreads"]["bits_per_dim_test_n6"]["standard_error"] == pytest.approx(
        bound.total.std(ddof=1) / math.sqrt(6)
    )
    assert told["identities"]["bits_per_dim_test_n6"]["of_images"] == 9
    card, arrays = unpack(paths["bound.safetensors"].read_bytes())
    assert card == identity.to_json()
    assert Bound.from_arrays(arrays).total.tobytes() == bound.total.tobytes()
    with paths["curves.csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["t"]) for row in rows] == list(range(T))
    assert sum(float(row["bits_per_dim"]) for row in rows) + parts[0] == pytest.approx(bound.total.mean())
    figure = curves_figure(identity.key, bound)
    over_t, trade = figure.axes
    (line,) = over_t.lines
    np.testing.assert_allclose(points_of(line), np.stack([np.arange(T), bound.terms.mean], axis=1))
    assert ([text.get_text() for text in over_t.get_legend().get_texts()], over_t.get_yscale()) == (
        [identity.key],
        "log",
    )
    band = over_t.collections[0].get_paths()[0].vertices
    for t in range(T):
        mean, error = bound.terms.mean[t], bound.terms.standard_error[t]
        np.testing.assert_allclose(sorted(set(band[band[:, 0] == t, 1]))[-1], mean + error)
    curve, start = trade.lines
    np.testing.assert_allclose(points_of(curve), np.stack(bound.rate_distortion(), axis=1))
    np.testing.assert_allclose(points_of(start), points_of(curve)[:1])
    assert holds(paths["curves.png"], figure)
    assert any("6 of 9 images" in line for line in measured.lines())


# The command


@pytest.mark.slow
def test_evaluate_measures_a_whole_split_and_repeats_nothing(typed: Typed, home: Path) -> None:
    made = trainer.make_run(
        home,
        diffusion={"num_timesteps": 25, "schedule": "cosine"},
        sampling={"steps": 5, "batch_size": 600},
        training={"steps": 2, "batch_size": 16},
    )
    trainer.train(str(made.folder))
    code, out, err = typed("evaluate", made.id, "--metrics", "bpd", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["identities"]["bits_per_dim_train_n1797"]["num_images"] == 1797
    assert 4 < told["values"]["bits_per_dim_train_n1797"] < 40
    assert {Path(path).name for path in told["written"]} == {
        *("scores.json", "bound.safetensors", "curves.csv", "curves.png")
    }
    chunks = {path: path.stat().st_mtime_ns for path in made.folder.glob("bound/*/chunk-*")}
    assert len(chunks) == 3
    code, out, _ = typed("evaluate", made.id, "--metrics", "bpd", "--json")
    assert (code, json.loads(out)["values"]) == (0, told["values"])
    assert {path: path.stat().st_mtime_ns for path in made.folder.glob("bound/*/chunk-*")} == chunks

    code, out, _ = typed("evaluate", made.id, "--metrics", "bpd", "-n", "9")
    assert code == 0
    assert "9 of 1797 images" in out
    code, out, err = typed("evaluate", made.id, "--metrics", "bpd", "-n", "9", "--json")
    assert code == 0, err
    key = "bits_per_dim_train_n9"
    assert json.loads(out)["values"][key] == made.state().summary[key]
    assert made.state().summary[key] != told["values"]["bits_per_dim_train_n1797"]
    code, _, err = typed("evaluate", made.id, "--metrics", "bpd", "--split", "test")
    assert code == 2
    assert "no split 'test'" in err
