"""References, yardsticks, scores and their identities."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.config.experiment import EvaluationConfig
from pipeline.data.image_set import ImageSet
from pipeline.data.shards import Dataset
from pipeline.errors import DataError, RefusedError
from pipeline.ingest.ingest import ingest
from pipeline.metrics.classifier import Classifier
from pipeline.metrics.classifier_store import classifier_for
from pipeline.metrics.features import Extracted, FeatureExtractor
from pipeline.metrics.fid import Moments, frechet_distance, inception_score, kid
from pipeline.metrics.fit_rule import FitRule, content_hashes, hash_rows
from pipeline.metrics.metric_identity import LUCK, Generation, MetricIdentity, differing
from pipeline.metrics.prdc import prdc
from pipeline.metrics.reference import Reference, prepare_reference
from pipeline.metrics.registry import METRICS, Pair
from pipeline.metrics.scores import Scores, over_seeds, write_scores
from pipeline.metrics.scoring import Scorer, choose_extractor, score
from pipeline.storage.tensor_file import unpack
from tests.kit.array_set import ArraySet, digits

GENERATION = Generation("ddim", 50)
Features = npt.NDArray[np.float32]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@dataclasses.dataclass
class Means(FeatureExtractor):
    """An extractor fitted elsewhere: the mean of each row of pixels of each channel. Counts the images it is shown."""

    shape: tuple[int, int, int] = (1, 8, 8)
    name: str = "means"
    sha256: str = "ab" * 32
    num_classes: int = 2
    min_images: int = 10
    fit_rule: FitRule | None = None
    seen: int = 0

    def __post_init__(self) -> None:
        self.width = self.shape[0] * self.shape[1]

    def resize_rule(self, shape: tuple[int, int, int]) -> str:
        if shape != self.shape:
            raise RefusedError(f"got {shape}")
        return "none"

    def __call__(self, images: npt.NDArray[np.uint8]) -> Extracted:
        self.seen += len(images)
        means = images.mean(axis=3).reshape(len(images), -1).astype(np.float32)
        return Extracted(means, means[:, :2])


def scores_of(
    images: npt.NDArray[np.uint8],
    data: ImageSet,
    extractor: FeatureExtractor,
    reference: Reference,
    generation: Generation = GENERATION,
    **options: Any,
) -> Scores:
    return score(extractor(images), Scorer(data, extractor, reference), generation, **options)


def features_of(extractor: FeatureExtractor, images: npt.NDArray[np.uint8]) -> Features:
    return extractor(images).features


@pytest.fixture(scope="module")
def data() -> ArraySet:
    return digits()


@pytest.fixture(scope="module")
def classifier(data: ArraySet, tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    return classifier_for(data, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def reference(data: ArraySet, classifier: Classifier, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return prepare_reference(data, classifier, 10_000, tmp_path_factory.mktemp("reference"))


def rows_of(data: ArraySet, extractor: FeatureExtractor, features: Features) -> list[int]:
    """Find the row of the dataset that each row of features was taken from."""
    own = features_of(extractor, data.images)
    distance = torch.cdist(torch.from_numpy(features).double(), torch.from_numpy(own).double())
    assert float(distance.min(dim=1).values.max()) < 1e-3
    return [int(i) for i in distance.argmin(dim=1)]


# References


def test_the_count_is_half_of_what_was_not_fitted_on_and_the_halves_are_disjoint(
    data: ArraySet, classifier: Classifier, reference: Reference
) -> None:
    fitted = classifier.card.rule.chosen(content_hashes(data.images))
    assert reference.num_images == (~fitted).sum() // 2
    sides = [rows_of(data, classifier, found.features) for found in (reference.real, reference.other)]
    assert [len(rows) for rows in sides] == [reference.num_images] * 2
    assert len(reference.noise.features) == reference.num_images
    assert len(set(sides[0])) == reference.num_images
    assert set(sides[0]).isdisjoint(sides[1])
    assert not fitted[sides[0] + sides[1]].any()


def test_a_smaller_count_is_taken_as_asked(data: ArraySet, classifier: Classifier, tmp_path: Path) -> None:
    small = prepare_reference(data, classifier, 200, tmp_path)
    assert small.num_images == len(small.real.features) == len(small.other.features) == small.moments.count == 200


def test_copies_of_a_dataset_in_another_order_give_the_same_reference(
    data: ArraySet, classifier: Classifier, reference: Reference, tmp_path: Path
) -> None:
    other = prepare_reference(data.permuted(3), classifier, 10_000, tmp_path)
    assert other.rule == reference.rule
    for one, two in ((reference.real, other.real), (reference.other, other.other)):
        np.testing.assert_allclose(one.features, two.features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(reference.moments.covariance, other.moments.covariance, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(reference.noise.features, other.noise.features)


@pytest.mark.parametrize("read_bytes", [64, 640, 10**9])
def test_an_extractor_fitted_elsewhere_is_given_the_whole_set(
    data: ArraySet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int
) -> None:
    """No row is dropped whatever the size of the chunks (trap 8), and more images may be generated than there are real ones."""
    monkeypatch.setattr("pipeline.data.image_set._READ_BYTES", read_bytes)
    part = ArraySet(data.images[:101])
    found = prepare_reference(part, Means(), 300, tmp_path)
    own = features_of(Means(), part.images).astype(np.float64)
    np.testing.assert_allclose(found.moments.mean, own.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.moments.covariance, np.cov(own, rowvar=False), rtol=1e-10, atol=1e-10)
    assert (found.num_images, found.moments.count, found.rule) == (300, 101, "all 101 images")
    assert len(found.real.features) == 101
    assert len(found.other.features) == len(found.noise.features) == 50
    by_content = np.argsort(content_hashes(part.images))
    np.testing.assert_allclose(found.real.features, own[by_content], rtol=1e-6)
    rest = own[by_content][:51]
    np.testing.assert_allclose(found.rest.mean, rest.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.other.features, own[by_content][51:], rtol=1e-6)


def test_features_are_kept_by_dataset_extractor_and_count(data: ArraySet, tmp_path: Path) -> None:
    """Trap 7: nothing kept may serve for anything else."""
    extractor = Means()
    first = prepare_reference(data, extractor, 100, tmp_path)
    shown = extractor.seen
    again = prepare_reference(data, extractor, 100, tmp_path)
    assert extractor.seen == shown
    np.testing.assert_array_equal(first.moments.scatter, again.moments.scatter)
    others: list[tuple[ArraySet, Means, int]] = [
        (ArraySet(data.images[:-1]), Means(), 100),
        (data.permuted(1), Means(), 100),
        (data, Means(sha256="cd" * 32), 100),
        (data, Means(name="others"), 100),
        (data, Means(), 101),
        (data, Means(fit_rule=FitRule(0.1)), 100),
    ]
    for dataset, other, count in others:
        prepare_reference(dataset, other, count, tmp_path)
        assert other.seen > 0
    assert len(list(tmp_path.iterdir())) == 1 + len(others)


def test_a_kept_file_that_is_damaged_or_of_something_else_is_computed_again(data: ArraySet, tmp_path: Path) -> None:
    first = prepare_reference(data, Means(), 100, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    prepare_reference(data, Means(sha256="cd" * 32), 100, tmp_path)
    (other,) = set(tmp_path.iterdir()) - {file}
    for content in (whole[:-40] + bytes([whole[-40] ^ 4]) + whole[-39:], b"", whole[:1000], other.read_bytes()):
        file.write_bytes(content)
        extractor = Means()
        again = prepare_reference(data, extractor, 100, tmp_path)
        assert extractor.seen > 0
        np.testing.assert_array_equal(first.moments.scatter, again.moments.scatter)
        assert file.read_bytes() == whole


def test_too_few_images_for_the_features(data: ArraySet, classifier: Classifier, tmp_path: Path) -> None:
    assert classifier.min_images == 4 * classifier.width
    with pytest.raises(RefusedError, match=r"127 images are too few for features of width 32.*at least 128"):
        prepare_reference(data, classifier, 127, tmp_path)
    with pytest.raises(RefusedError, match=r"leaves \d+ images for each half"):
        prepare_reference(ArraySet(data.images[:300]), classifier, 500, tmp_path)
    with pytest.raises(RefusedError, match=r"shape \(1, 8, 8\), got \(1, 8, 10\)"):
        prepare_reference(ArraySet(np.zeros((900, 1, 8, 10), np.uint8)), classifier, 500, tmp_path)


# Scores


def real_images(data: ArraySet, classifier: Classifier, count: int) -> npt.NDArray[np.uint8]:
    """Real digits that are in no half of the reference: those fitted on, repeated to the count."""
    fitted = data.images[classifier.card.rule.chosen(content_hashes(data.images))]
    return np.resize(fitted, (count, 1, 8, 8))


def test_values_are_those_of_the_formulas_on_the_same_features(
    data: ArraySet, classifier: Classifier, reference: Reference
) -> None:
    n = reference.num_images
    images = np.random.default_rng(0).integers(0, 256, (n, 1, 8, 8), dtype=np.uint8)
    images[::2] = real_images(data, classifier, n)[::2]
    found = classifier(images)
    got = scores_of(images, data, classifier, reference, GENERATION, metrics=list(METRICS))
    real, judged = reference.real.features, found.features
    expected_kid = kid(real, judged, subset_size=n // 2)
    assert found.logits is not None
    expected_is = inception_score(found.logits)
    expected = {
        "fid": frechet_distance(Moments.of(real), Moments.of(judged)),
        "kid": expected_kid.mean,
        "inception_score": expected_is[0],
        **prdc(real, judged, k_precision=3, k_density=5)._asdict(),
    }
    assert got.values == {f"{name}_classifier_n{n}": pytest.approx(v, rel=1e-9) for name, v in expected.items()}
    spreads = {"kid": (expected_kid.std, f"100 subsets of {n // 2}"), "inception_score": (expected_is[1], "10 splits")}
    assert {key: (s.value, s.over) for key, s in got.spreads.items()} == {
        f"{name}_classifier_n{n}": (pytest.approx(value, rel=1e-9), over) for name, (value, over) in spreads.items()
    }
    assert got.yardsticks["real_half"]["fid"] == pytest.approx(
        frechet_distance(Moments.of(real), Moments.of(reference.other.features)), rel=1e-9
    )
    assert set(got.yardsticks["uniform_noise"]) == set(expected)


def test_settings_of_the_metrics_are_part_of_what_they_are(
    data: ArraySet, classifier: Classifier, reference: Reference
) -> None:
    n = reference.num_images
    found = classifier(real_images(data, classifier, n))
    assert found.logits is not None

    def score_with(**chosen: int) -> Scores:
        settings = EvaluationConfig(**chosen)
        return score(found, Scorer(data, classifier, reference), GENERATION, metrics=["kid", "is"], settings=settings)

    got = score_with(kid_subset_size=50, inception_score_splits=1)
    kid_key, is_key = f"kid_classifier_n{n}", f"inception_score_classifier_n{n}"
    expected = kid(reference.real.features, found.features, subset_size=50)
    p = np.exp(found.logits.astype(float))
    p /= p.sum(axis=1, keepdims=True)
    of_all = np.exp((p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1).mean())
    assert got.values == {kid_key: pytest.approx(expected.mean), is_key: pytest.approx(of_all, rel=1e-6)}
    assert list(got.spreads) == [kid_key]  # one part has no deviation
    assert [got.identities[key].settings for key in (kid_key, is_key)] == ["100 subsets of 50, seed 0", "1 split"]
    (line,) = differences(got.identities[kid_key], score_with(kid_subset_size=51).identities[kid_key])
    assert line.startswith("settings: 100 subsets of 50")
    for chosen, told in (
        ({"kid_subset_size": n + 1}, "kid_subset_size"),
        ({"inception_score_splits": n + 1}, "splits"),
    ):
        with pytest.raises(RefusedError, match=f"{told}: got {n + 1}"):
            score_with(**chosen)


def test_a_setting_has_to_fit_the_images_and_not_the_yardsticks(data: ArraySet, tmp_path: Path) -> None:
    extractor = Means()
    every = 60
    few = ArraySet(data.images[:every])
    reference = prepare_reference(few, extractor, every, tmp_path)
    assert len(reference.other.features) == every // 2
    found = extractor(few.images)
    settings = EvaluationConfig(kid_subset_size=every // 2 + 1)
    got = score(found, Scorer(few, extractor, reference), GENERATION, metrics=["kid"], settings=settings)
    (identity,) = got.identities.values()
    assert identity.settings.startswith(f"100 subsets of {every // 2 + 1}")
    assert abs(got.yardsticks["real_half"]["kid"]) < got.yardsticks["uniform_noise"]["kid"]


@pytest.mark.parametrize(("count", "size"), [(998, 499), (1000, 1000), (1999, 1000), (2500, 1000)])
def test_subsets_are_of_a_thousand_where_there_are_as_many(count: int, size: int) -> None:
    features = np.random.default_rng(0).normal(size=(count, 2)).astype(np.float32)
    real, judged = (Extracted(part, part) for part in (features, features + 1))
    pair = Pair(real, judged, Moments.of(real.features), Moments.of(judged.features))
    assert METRICS["kid"](pair, EvaluationConfig()).over == f"100 subsets of {size}"


def test_yardsticks_order_real_generated_and_noise(
    data: ArraySet, classifier: Classifier, reference: Reference
) -> None:
    n = reference.num_images
    rng = np.random.default_rng(0)
    blurred = np.clip(real_images(data, classifier, n) + rng.normal(scale=64, size=(n, 1, 8, 8)), 0, 255).astype(
        np.uint8
    )
    got = scores_of(blurred, data, classifier, reference, GENERATION)
    (fid_key, kid_key) = (f"{m}_classifier_n{n}" for m in ("fid", "kid"))
    assert got.yardsticks["real_half"]["fid"] < got.values[fid_key] < got.yardsticks["uniform_noise"]["fid"]
    assert got.yardsticks["real_half"]["kid"] < got.values[kid_key] < got.yardsticks["uniform_noise"]["kid"]


def test_real_digits_pass_the_acceptance_test_and_noise_fails_it(
    data: ArraySet, classifier: Classifier, reference: Reference
) -> None:
    n = reference.num_images
    got = scores_of(real_images(data, classifier, n), data, classifier, reference, GENERATION)
    assert got.confident["generated"] >= 0.9
    assert min(got.class_shares.values()) >= 0.04
    assert list(got.class_shares) == [str(d) for d in range(10)]
    assert sum(got.class_shares.values()) == pytest.approx(1)
    assert got.confident["real_half"] > 0.95
    assert got.confident["uniform_noise"] < 0.05


def test_an_extractor_of_other_classes_says_nothing_about_confidence(data: ArraySet, tmp_path: Path) -> None:
    extractor = Means()
    found = prepare_reference(data, extractor, 300, tmp_path)
    got = scores_of(data.images[:300], data, extractor, found, GENERATION, metrics=("fid", "kid", "prdc"))
    assert got.confident == got.class_shares == {}
    identity = got.identities["fid_means_n300"]
    assert (identity.num_images, identity.num_reference, identity.reference) == (300, 1797, "all 1797 images")
    per_image = got.identities["kid_means_n300"]
    assert (per_image.num_reference, per_image.reference) == (300, "first 300 by content of all 1797 images")


def test_what_cannot_be_scored(data: ArraySet, classifier: Classifier, reference: Reference) -> None:
    n = reference.num_images
    images = real_images(data, classifier, n)
    with pytest.raises(RefusedError, match=f"got {n - 1} generated images, expected {n}"):
        scores_of(images[:-1], data, classifier, reference, GENERATION)


def test_names_are_fit_for_mlflow_and_tell_yardsticks_apart(
    data: ArraySet, classifier: Classifier, reference: Reference
) -> None:
    n = reference.num_images
    got = scores_of(real_images(data, classifier, n), data, classifier, reference, GENERATION)
    flat = got.flat()
    assert flat[f"fid_classifier_n{n}"] == got.values[f"fid_classifier_n{n}"]
    assert flat[f"yardstick_real_half_fid_classifier_n{n}"] == got.yardsticks["real_half"]["fid"]
    assert flat[f"kid_std_classifier_n{n}"] == got.spreads[f"kid_classifier_n{n}"].value
    assert len(flat) == 3 * len(got.values) + len(got.spreads)
    assert all(re.fullmatch(r"[A-Za-z0-9_\-. /]{1,250}", name) for name in flat)
    json.dumps(flat, allow_nan=False)


def test_files_have_the_scores_and_the_moments_that_fid_compared(
    data: ArraySet, classifier: Classifier, reference: Reference, tmp_path: Path
) -> None:
    n = reference.num_images
    got = scores_of(real_images(data, classifier, n), data, classifier, reference, GENERATION, metrics=list(METRICS))
    paths = write_scores(got, tmp_path / "scores", {"model": {"run": "abc", "step": 3}})
    assert sorted(p.name for p in paths) == ["moments.safetensors", "scores.json"]
    told = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert told == {"model": {"run": "abc", "step": 3}, **json.loads(json.dumps(got.to_json()))}
    assert told["values"] == got.values
    _, arrays = unpack((tmp_path / "scores" / "moments.safetensors").read_bytes())
    generated, compared = (Moments.from_arrays(arrays, name) for name in ("generated", "reference"))
    assert frechet_distance(compared, generated) == got.values[f"fid_classifier_n{n}"]


def test_scores_of_several_seeds_are_their_mean_with_its_deviation(
    data: ArraySet, classifier: Classifier, reference: Reference
) -> None:
    n = reference.num_images
    noise = np.random.default_rng(1)

    def of_seed(seed: int) -> Scores:
        images = (real_images(data, classifier, n) * noise.uniform(0.7, 1, (n, 1, 1, 1))).astype(np.uint8)
        return scores_of(images, data, classifier, reference, dataclasses.replace(GENERATION, seed=seed))

    each = [of_seed(seed) for seed in (4, 5, 6)]
    joint = over_seeds(each)
    key, old = f"fid_classifier_n{n}_seeds3", f"fid_classifier_n{n}"
    values = [scores.values[old] for scores in each]
    assert joint.values[key] == pytest.approx(np.mean(values))
    assert joint.spreads[key].parts == tuple(values)
    assert joint.spreads[key].value == pytest.approx(np.std(values, ddof=1))
    assert joint.spreads[key].over == "3 seeds"
    assert joint.flat()[f"fid_std_classifier_n{n}_seeds3"] == joint.spreads[key].value
    generation = joint.identities[key].generation
    assert (generation.seed, generation.num_seeds) == (4, 3)
    assert over_seeds(each[:1]) is each[0]
    with pytest.raises(ValueError, match="consecutive"):
        over_seeds([each[0], each[2]])
    other = scores_of(
        real_images(data, classifier, n), data, classifier, reference, dataclasses.replace(GENERATION, seed=5, steps=9)
    )
    with pytest.raises(ValueError, match="more than the seed"):
        over_seeds([each[0], other])


# Identities


def differences(a: MetricIdentity, b: MetricIdentity, but: Collection[str] = ()) -> list[str]:
    return differing(json.loads(json.dumps(a.to_json())), b.to_json(), but)


def an_identity() -> MetricIdentity:
    return MetricIdentity(
        metric="fid",
        settings="",
        extractor="classifier",
        extractor_sha256="ab" * 32,
        resize="none",
        num_images=600,
        num_reference=600,
        reference="all",
        dataset="cd" * 32,
        generation=GENERATION,
    )


def test_equal_identities_have_no_differences_nor_do_they_as_json() -> None:
    assert differences(an_identity(), an_identity()) == []
    assert an_identity().key == "fid_classifier_n600"
    assert an_identity().named("kid").key == "kid_classifier_n600"


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(MetricIdentity) if f.name != "generation"])
def test_every_field_makes_two_values_unlike(field: str) -> None:
    value: Any = getattr(an_identity(), field)
    changed: dict[str, Any] = {field: value + 1 if isinstance(value, int) else value + "x"}
    other = dataclasses.replace(an_identity(), **changed)
    (line,) = differences(an_identity(), other)
    assert line.startswith(f"{field}: {value}")


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Generation)])
def test_every_part_of_the_generation_makes_two_values_unlike(field: str) -> None:
    value: Any = getattr(GENERATION, field)
    changed: dict[str, Any] = {field: value + "x" if isinstance(value, str) else value + 1}
    generation = dataclasses.replace(GENERATION, **changed)
    (line,) = differences(an_identity(), dataclasses.replace(an_identity(), generation=generation))
    assert line.startswith(f"generation.{field}: {value}, ")
    by_chance_alone = f"generation.{field}" in LUCK
    assert by_chance_alone == (field in ("seed", "num_seeds", "chunk"))
    assert (
        bool(differences(an_identity(), dataclasses.replace(an_identity(), generation=generation), but=LUCK))
        != by_chance_alone
    )


# Choice of the extractor


@pytest.fixture
def no_inception(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DDPM_PIPE_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.mark.usefixtures("no_inception")
def test_auto_is_the_classifier_for_labelled_gray_images_else_inception(data: ArraySet, tmp_path: Path) -> None:
    assert choose_extractor(data, tmp_path, download=False).name == "classifier"
    for dataset in (ArraySet(data.images), ArraySet(np.zeros((9, 1, 80, 80), np.uint8), np.zeros(9, np.int64))):
        with pytest.raises(DataError, match="no Inception weights here"):
            choose_extractor(dataset, tmp_path, download=False)
    with pytest.raises(DataError, match="no Inception weights here"):
        choose_extractor(data, tmp_path, kind="inception", download=False)
    with pytest.raises(RefusedError, match="no labels"):
        choose_extractor(ArraySet(data.images), tmp_path, kind="classifier")
    color = ArraySet(np.repeat(data.images[:40], 3, axis=1), np.arange(40) % 10, "color")
    with pytest.raises(RefusedError, match="40 images, too few"):  # no weights, so the classifier was turned to
        choose_extractor(color, tmp_path, download=False)
    with pytest.raises(DataError, match=r"mine\.pth: cannot be read"):  # weights that were named are not passed over
        choose_extractor(color, tmp_path, inception_weights=str(tmp_path / "mine.pth"))


# Real datasets


def test_the_ingested_digits_are_the_shipped_classifiers(classifier: Classifier, tmp_path: Path) -> None:
    ingest("digits", tmp_path / "digits")
    dataset = Dataset.open(tmp_path / "digits")
    chosen = choose_extractor(dataset, tmp_path / "cache", download=False)
    assert chosen.sha256 == classifier.sha256
    assert classifier.card.fingerprint == dataset.manifest.fingerprint
    found = prepare_reference(dataset, chosen, 10_000, tmp_path / "cache")
    got = scores_of(dataset.read(np.arange(found.num_images)), dataset, chosen, found, GENERATION)
    assert got.values[f"fid_classifier_n{found.num_images}"] < got.yardsticks["uniform_noise"]["fid"] / 50


@pytest.mark.slow
def test_the_shipped_classifier_knows_mnist(real_data: Path, tmp_path: Path) -> None:
    """By the images of the training split, and judging those of the other split, which it has never met."""
    for split in ("train", "validation"):
        ingest(str(real_data / "mnist"), tmp_path / split, split=split)
    train, validation = (Dataset.open(tmp_path / split) for split in ("train", "validation"))
    chosen = classifier_for(train, tmp_path / "cache")
    assert (chosen.card.fitted_on, chosen.card.fingerprint) == ("mnist", train.manifest.fingerprint)
    rows = np.arange(2000)
    found = chosen(validation.read(rows))
    assert found.logits is not None
    assert (found.logits.argmax(axis=1) == validation.labels(rows)).mean() > 0.98
    assert np.isin(np.array(chosen.card.sketch, np.uint64), hash_rows(validation)).sum() == 0
