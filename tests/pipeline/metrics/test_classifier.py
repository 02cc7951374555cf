"""The classifier: which images it is fitted on, its file, and the judgement of the one shipped for the digits."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm import BetaSchedule, GaussianDiffusion, UNet, ddim, timestep_subset
from pipeline.data.images import to_uint8
from pipeline.errors import DataError, RefusedError
from pipeline.metrics.classifier import Classifier, SmallNetwork, decide
from pipeline.metrics.classifier_fit import fit
from pipeline.metrics.classifier_store import SHIPPED, Recipe, classifier_for, fit_and_save
from pipeline.metrics.fit_rule import SALT, FitRule, content_hashes, hash_rows, held_out_rows
from pipeline.storage.tensor_file import Arrays, pack, unpack
from tests.kit.array_set import ArraySet, digits, stripes

QUICK = Recipe(fraction=0.4, width=8, num_steps=60)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def digit_set() -> ArraySet:
    return digits()


@pytest.fixture(scope="module")
def shipped(digit_set: ArraySet, tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    return classifier_for(digit_set, tmp_path_factory.mktemp("cache"))


# Which images are fitted on


def test_content_hash_is_blake2b_of_salt_shape_and_pixels() -> None:
    image = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(1, 2, 3, 4)
    digest = hashlib.blake2b(b"salt\x00" + b"2x3x4\x00" + bytes(range(24))).digest()
    assert content_hashes(image, "salt")[0] == int.from_bytes(digest[:8], "big")
    assert content_hashes(image.reshape(1, 4, 3, 2), "salt")[0] != content_hashes(image, "salt")[0]


@settings(max_examples=20)
@given(seed=st.integers(0, 2**16))
def test_the_fit_subset_is_decided_by_content_not_by_place(seed: int) -> None:
    """Two copies in different order, and a superset, put each image on the same side; duplicates fall on one side."""
    images = np.random.default_rng(seed).integers(0, 256, (60, 1, 8, 8), dtype=np.uint8)
    more = np.random.default_rng(seed + 1).integers(0, 256, (30, 1, 8, 8), dtype=np.uint8)
    order = np.random.default_rng(seed + 2).permutation(60)
    rule = FitRule(0.5)
    chosen = rule.chosen(content_hashes(images))
    np.testing.assert_array_equal(rule.chosen(content_hashes(images[order])), chosen[order])
    np.testing.assert_array_equal(rule.chosen(content_hashes(np.concatenate([more, images, images])))[30:90], chosen)
    np.testing.assert_array_equal(rule.chosen(content_hashes(np.concatenate([more, images, images])))[90:], chosen)


def test_the_fit_subset_has_the_share_asked_for_and_is_nested() -> None:
    hashes = content_hashes(np.random.default_rng(0).integers(0, 256, (4000, 1, 4, 4), dtype=np.uint8))
    shares = [FitRule(f).chosen(hashes) for f in (0.1, 0.2, 1 / 3, 0.7)]
    for fraction, chosen in zip((0.1, 0.2, 1 / 3, 0.7), shares, strict=True):
        assert abs(chosen.mean() - fraction) < 4 * np.sqrt(fraction * (1 - fraction) / 4000)
    assert all((~b[a]).sum() == 0 for a, b in itertools.pairwise(shares))  # a larger part holds the smaller one


def test_held_out_rows_are_the_rest_in_an_order_of_content() -> None:
    data = stripes(50, seed=0)
    other = data.permuted(seed=1)
    rule = FitRule(0.4)
    rows, other_rows = (held_out_rows(hash_rows(d), rule) for d in (data, other))
    np.testing.assert_array_equal(data.images[rows], other.images[other_rows])
    fitted = set(np.flatnonzero(rule.chosen(content_hashes(data.images))))
    assert fitted.isdisjoint(rows)
    assert len(fitted) + len(rows) == 50


# The network and its file


@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (3, 17, 9), (2, 8, 64), (1, 64, 64), (4, 33, 8)]
)
def test_network_takes_any_size_and_normalises_its_features(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    network = SmallNetwork(shape, num_classes=7, width=16)
    images = torch.randint(0, 256, (5, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    features, logits = network(images)
    assert features.shape == (5, 16)
    assert logits.shape == (5, 7)
    torch.testing.assert_close(features.mean(dim=1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.var(dim=1, unbiased=False), torch.ones(5), atol=1e-2, rtol=0)


def test_fitting_repeats_bit_for_bit_whatever_the_global_generator_does() -> None:
    data = stripes(80, seed=0)
    assert data.given_labels is not None
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = fit(data.images, data.given_labels, 2, width=8, num_steps=10, seed=3).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    second = fit(data.images, data.given_labels, 2, width=8, num_steps=10, seed=3).state_dict()
    other = fit(data.images, data.given_labels, 2, width=8, num_steps=10, seed=4).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


def fit_stripes(path: Path, data: ArraySet | None = None) -> Classifier:
    data = data or stripes(600, seed=0)
    fit_and_save(data, path, recipe=QUICK, hashes=hash_rows(data), command="test")
    return Classifier.load(path)


def test_fitted_on_part_and_measured_on_the_rest(tmp_path: Path) -> None:
    data = stripes(600, seed=0)
    classifier = fit_stripes(tmp_path / "c.safetensors", data)
    card = classifier.card
    chosen = FitRule(0.4).chosen(content_hashes(data.images))
    assert card.num_fitted == chosen.sum()
    assert card.num_held_out == (~chosen).sum()
    choice, confidence = decide(classifier(data.images[~chosen]))
    assert data.given_labels is not None
    assert card.accuracy == (choice == data.given_labels[~chosen]).mean()
    assert card.accuracy > 0.95
    assert card.confident == (confidence > 0.9).mean()
    assert card.sketch == tuple(sorted(map(int, content_hashes(data.images[chosen])))[:256])
    assert card.rule == FitRule(0.4, SALT)
    assert (card.class_names, card.fingerprint) == (data.class_names, data.manifest.fingerprint)


def test_equal_fits_give_equal_files_addressed_by_their_hash(tmp_path: Path) -> None:
    one, two = fit_stripes(tmp_path / "1.safetensors"), fit_stripes(tmp_path / "2.safetensors")
    assert one.sha256 == two.sha256 == hashlib.sha256((tmp_path / "1.safetensors").read_bytes()).hexdigest()
    images = stripes(7, seed=5).images
    np.testing.assert_array_equal(one(images).features, two(images).features)
    assert one(images[:0]).features.shape == (0, 8)
    with pytest.raises(DataError, match="expected 0000"):
        Classifier.load(tmp_path / "1.safetensors", sha256="0" * 64)


def test_a_damaged_or_foreign_file_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    fit_stripes(path)
    whole = path.read_bytes()
    for content in (b"", b"no", whole[:-1], whole[: len(whole) // 2], whole[:-7] + b"\xff" + whole[-6:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="remove it and fit it again") as caught:
            Classifier.load(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(pack({"a": np.zeros(3)}, {"format": 1}))
    with pytest.raises(DataError, match="fit it again"):
        Classifier.load(path)
    with pytest.raises(DataError, match="cannot be read"):
        Classifier.load(tmp_path / "absent.safetensors")


def test_array_files_notice_flipped_bits() -> None:
    arrays: Arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array([1, 2], dtype=np.int64)}
    card = {"name": "x", "numbers": [1, 2.5]}
    data = pack(arrays, card)
    assert data == pack({name: arrays[name] for name in ("a", "b")}, card)
    got_card, got = unpack(data)
    assert got_card == card
    for name, array in arrays.items():
        np.testing.assert_array_equal(got[name], array)
    rng = np.random.default_rng(0)
    noticed = 0
    for bit in rng.choice(8 * len(data), 300, replace=False):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            same_card, same = unpack(bytes(damaged))
        except ValueError:
            noticed += 1
        else:  # a bit of the header that carries nothing
            assert same_card == card
            assert all(np.array_equal(same[k], arrays[k]) and same[k].dtype == arrays[k].dtype for k in arrays)
    assert noticed > 250


def test_images_of_another_shape_cannot_be_judged(tmp_path: Path) -> None:
    classifier = fit_stripes(tmp_path / "c.safetensors")
    with pytest.raises(RefusedError, match=r"shape \(1, 8, 8\), got \(1, 9, 9\)"):
        classifier.resize_rule((1, 9, 9))
    assert classifier.resize_rule((1, 8, 8)) == "none"
    with pytest.raises(RefusedError, match=r"got \(3, 8, 8\)"):
        classifier(np.zeros((2, 3, 8, 8), dtype=np.uint8))


def test_decide_is_the_softmax(tmp_path: Path) -> None:
    found = fit_stripes(tmp_path / "c.safetensors")(stripes(20, seed=1).images)
    assert found.logits is not None
    confidence, choice = torch.from_numpy(found.logits).double().softmax(dim=1).max(dim=1)
    np.testing.assert_array_equal(decide(found)[0], choice.numpy())
    np.testing.assert_allclose(decide(found)[1], confidence.numpy(), rtol=1e-12)


# Which classifier a dataset gets


def test_digits_get_the_shipped_classifier_whatever_their_order_and_name(digit_set: ArraySet, tmp_path: Path) -> None:
    for data in (digit_set, digit_set.permuted(1), ArraySet(digit_set.images, digit_set.given_labels, "mine")):
        assert classifier_for(data, tmp_path / "cache").sha256 == SHIPPED["digits"]
    assert not (tmp_path / "cache").exists()


def test_shipped_files_are_those_named_in_the_code() -> None:
    folder = Path(fit_and_save.__code__.co_filename).parent.parent / "weights"
    assert {p.stem: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.safetensors")} == SHIPPED


def test_a_classifier_of_the_digits_is_not_used_on_anything_else(digit_set: ArraySet, tmp_path: Path) -> None:
    """Same shape and class names, other images; same images, other labels; half of the classes merged."""
    labels = digit_set.given_labels
    assert labels is not None
    names = digit_set.class_names
    others = [
        ArraySet(255 - digit_set.images, labels, "digits", names),
        ArraySet(digit_set.images, (labels + 1) % 10, "digits", names),
        ArraySet(digit_set.images, labels % 2, "digits", ("even", "odd")),
    ]
    for data in others:
        with pytest.raises(
            RefusedError, match="held-out labels"
        ):  # 2 steps of fitting: too poor to be used, but its own
            classifier_for(data, tmp_path, recipe=Recipe(fraction=0.4, width=32, num_steps=2))


@pytest.mark.slow
def test_fitted_once_and_kept(tmp_path: Path) -> None:
    data = stripes(600, seed=0)
    seen: list[str] = []
    first = classifier_for(data, tmp_path, recipe=QUICK, progress=lambda what, done, total: seen.append(what))
    assert "fitting the classifier" in seen
    (file,) = tmp_path.iterdir()
    seen.clear()
    again = classifier_for(data, tmp_path, recipe=QUICK, progress=lambda what, done, total: seen.append(what))
    assert "fitting the classifier" not in seen
    assert first.sha256 == again.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_bytes(file.read_bytes()[:-3])
    assert classifier_for(data, tmp_path, recipe=QUICK).sha256 == first.sha256  # damaged: fitted again, the same bytes
    classifier_for(stripes(600, seed=1), tmp_path, recipe=QUICK)
    classifier_for(data, tmp_path, recipe=Recipe(fraction=0.4, width=8, num_steps=61))
    assert len(list(tmp_path.iterdir())) == 3


def test_labels_that_cannot_be_known_refuse_the_metric_with_the_reason(tmp_path: Path) -> None:
    data = stripes(600, seed=0, mislabelled=0.3)
    for _ in range(2):  # the second time from the kept file
        with pytest.raises(RefusedError, match=r"names \d\d\.\d% of its \d+ held-out labels, expected at least 95%"):
            classifier_for(data, tmp_path, recipe=QUICK)
    assert len(list(tmp_path.iterdir())) == 1


def test_datasets_without_a_classifier(tmp_path: Path) -> None:
    unlabelled = ArraySet(np.zeros((600, 1, 8, 8), np.uint8))
    large = ArraySet(np.zeros((4, 3, 80, 80), np.uint8), np.zeros(4, np.int64))
    tiny = ArraySet(np.zeros((600, 1, 4, 8), np.uint8), np.zeros(600, np.int64))
    few = stripes(90, seed=0)
    data = stripes(600, seed=0)
    one = ArraySet(data.images, np.ones(600, np.int64), "stripes", ("along", "across"))
    for dataset, reason in [
        (unlabelled, "no labels"),
        (large, "80x80, the classifier takes 8 to 64"),
        (tiny, "4x8"),
        (few, "90 images, too few"),
        (one, "has images of 1 class \\('across'\\)"),
    ]:
        with pytest.raises(RefusedError, match=reason) as caught:
            classifier_for(dataset, tmp_path, recipe=QUICK)
        assert "\n" not in str(caught.value)
        assert "inception" in str(caught.value)


def test_classes_without_fitted_images_are_left_out(tmp_path: Path) -> None:
    """A name without images, and a class of one image that fell on the other side: the others are told apart as without them."""
    data = stripes(600, seed=0)
    assert data.given_labels is not None
    alone = int(held_out_rows(hash_rows(data), FitRule(0.4))[0])
    labels = 2 * data.given_labels + 1
    labels[alone] = 0
    names = ("lonely", "along", "never", "across")
    classifier = classifier_for(ArraySet(data.images, labels, "stripes", names), tmp_path, recipe=QUICK)
    plain = fit_stripes(tmp_path / "plain.safetensors", data)
    assert classifier.card.class_names == ("along", "across")
    assert classifier.card.num_held_out == plain.card.num_held_out - 1
    assert classifier.card.accuracy > 0.95
    np.testing.assert_array_equal(classifier(data.images[:50]).features, plain(data.images[:50]).features)


# What the digits' classifier says


def held_out(data: ArraySet, classifier: Classifier) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return held_out_rows(hash_rows(data), classifier.card.rule)


def test_real_digits_are_recognised_with_confidence(digit_set: ArraySet, shipped: Classifier) -> None:
    rows = held_out(digit_set, shipped)
    choice, confidence = decide(shipped(digit_set.images[rows]))
    assert digit_set.given_labels is not None
    assert (choice == digit_set.given_labels[rows]).mean() > 0.985
    assert (confidence > 0.9).mean() > 0.97
    shares = np.bincount(choice, minlength=10) / len(rows)
    assert shares.min() > 0.04


def strange_images(digit_set: ArraySet) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    """Images that no one takes for digits, by name."""
    rng = np.random.default_rng(0)
    n = 400
    normal = rng.normal(size=(n, 1, 8, 8))
    columns = digit_set.images[:n].copy().reshape(n, -1)
    return {
        "uniform": rng.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8),
        "normal": np.clip(127.5 + 127.5 * normal, 0, 255).astype(np.uint8),
        "black and white": np.where(normal > 0, 255, 0).astype(np.uint8),
        "gray": np.repeat(np.arange(256, dtype=np.uint8), 64).reshape(256, 1, 8, 8),
        "scrambled digits": rng.permuted(columns, axis=1).reshape(n, 1, 8, 8),
    }


@pytest.mark.parametrize("kind", ["uniform", "normal", "black and white", "gray", "scrambled digits"])
def test_what_is_no_digit_gets_no_confidence(digit_set: ArraySet, shipped: Classifier, kind: str) -> None:
    _, confidence = decide(shipped(strange_images(digit_set)[kind]))
    assert (confidence > 0.9).mean() < 0.02


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_an_untrained_model_fails_the_acceptance_test(shipped: Classifier, spread: float) -> None:
    """DDIM samples of an untrained network: its output is zero as initialised, or random with its last layer shaken."""
    torch.manual_seed(0)
    network = UNet(1, image_size=8, channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=())
    with torch.no_grad():
        for parameter in list(network.parameters())[-2:]:
            parameter.add_(spread * torch.randn(parameter.shape))
    diffusion = GaussianDiffusion(BetaSchedule.named("linear", num_timesteps=1000))
    x_T = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        *_, (_, x0) = ddim(diffusion, network.eval(), x_T, timesteps=timestep_subset(1000, 10, "trailing"))
    choice, confidence = decide(shipped(to_uint8(x0).numpy()))
    shares = np.bincount(choice, minlength=10) / len(choice)
    assert (confidence > 0.9).mean() < 0.1
    assert shares.min() < 0.04


@pytest.mark.slow
def test_the_shipped_classifier_is_what_its_command_makes(
    digit_set: ArraySet, shipped: Classifier, tmp_path: Path
) -> None:
    """Bytes are promised per machine and torch release only; a fit here must agree about nearly every image."""
    path = tmp_path / "digits.safetensors"
    recipe = Recipe.for_dataset(digit_set)
    card = fit_and_save(digit_set, path, recipe=recipe, hashes=hash_rows(digit_set), command=shipped.card.command)
    rows = held_out(digit_set, shipped)
    theirs, ours = (decide(c(digit_set.images[rows]))[0] for c in (shipped, Classifier.load(path)))
    assert (theirs == ours).mean() > 0.98
    assert abs(card.accuracy - shipped.card.accuracy) < 0.01
    assert (card.num_fitted, card.sketch, card.rule) == (
        shipped.card.num_fitted,
        shipped.card.sketch,
        shipped.card.rule,
    )
