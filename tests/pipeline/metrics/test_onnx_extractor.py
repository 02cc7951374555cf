"""Extractors in ONNX form: features are the network's, what decides them is in the identity, and wrong files end in one line."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms.v2 import functional as transforms

from pipeline.config.experiment import EvaluationConfig, OnnxConfig
from pipeline.errors import DataError, PipelineError, RefusedError, UsageError
from pipeline.metrics.onnx_extractor import OnnxExtractor
from pipeline.metrics.scoring import Generation, choose_extractor, scorer_of
from pipeline.training.threads import num_threads
from tests.kit.array_set import ArraySet

WIDTH, SIZE = 6, 16
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
SETTINGS = OnnxConfig(mean=MEAN, std=STD)
pytest.importorskip("onnxruntime")


def network() -> nn.Module:
    torch.manual_seed(0)
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(3, 32, 3, stride=2), nn.SiLU(), nn.Conv2d(32, WIDTH, 3), pool).eval()


def export(path: Path, *, external_data: bool = False, batch: bool = True) -> Path:
    program = torch.onnx.export(
        network(), (torch.zeros(2, 3, SIZE, SIZE),), dynamo=True, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("n", min=1, max=4096)},) if batch else None,
    )  # fmt: skip
    assert program is not None
    program.save(str(path), external_data=external_data)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("onnx") / "Tiny net.onnx", external_data=True)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (70, 3, 24, 24), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_features_are_those_of_the_network_by_torchvisions_resize(file, images, channels):
    images = images[:, :channels]
    extractor = choose_extractor(ArraySet(images), Path("unused"), kind=str(file), onnx=SETTINGS)
    x = torch.from_numpy(images).float() / 255
    x = transforms.resize(x, [SIZE, SIZE], transforms.InterpolationMode.BICUBIC, antialias=True).expand(-1, 3, -1, -1)
    with torch.no_grad():
        expected = network()(transforms.normalize(x, list(MEAN), list(STD)))
    found = extractor(images)
    np.testing.assert_allclose(found.features, expected.numpy(), rtol=1e-5, atol=1e-5)
    assert found.logits.shape == (70, 0)
    assert (extractor.name, extractor.width) == ("onnx_tiny_net", WIDTH)


def test_features_are_the_same_bytes_on_any_number_of_threads_and_in_another_process(file, images):
    extractor = OnnxExtractor(file, SETTINGS)
    found = []
    for threads in (1, 2, 3):
        with num_threads(threads):
            found.append(extractor(images).features.tobytes())
    sent: OnnxExtractor = pickle.loads(pickle.dumps(extractor))  # noqa: S301
    assert {*found, sent(images).features.tobytes()} == {found[0]}
    assert sent.sha256 == extractor.sha256


def test_the_identity_changes_with_the_file_its_data_and_the_settings(file, tmp_path):
    assert [path.name for path in file.parent.iterdir() if path.suffix == ".data"], (
        "the weights are in a file of their own"
    )
    copies = shutil.copytree(file.parent, tmp_path / "copies")
    same = OnnxExtractor(copies / file.name, SETTINGS)
    hashes = {OnnxExtractor(file, SETTINGS).sha256, same.sha256}
    assert len(hashes) == 1
    for changed in ({"resize": "bilinear"}, {"std": (0.2, 0.3, 0.5)}, {"mean": (0.4, 0.5, 0.7)}):
        other = OnnxExtractor(file, SETTINGS.model_copy(update=changed))
        hashes.add(other.sha256)
        assert other.resize_rule((3, 24, 24)) != same.resize_rule((3, 24, 24))
    (weights,) = copies.glob("*.data")
    data = bytearray(weights.read_bytes())
    data[1] ^= 1
    weights.write_bytes(data)
    hashes.add(OnnxExtractor(copies / file.name, SETTINGS).sha256)
    assert len(hashes) == 5


@pytest.mark.parametrize(
    ("content", "settings", "error", "said"),
    [
        (None, {}, DataError, r"net\.onnx: net\.onnx cannot be read \(No such file"),
        (b"not a graph", {}, DataError, r"net\.onnx: .*(not an ONNX file|refuses it)"),
        ("one image", {}, DataError, r"got inputs .* \[2, 3, 16, 16\], expected one, float32 \[n, C, H, W\] with any n"),
        ("graph", {"size": 32}, UsageError, r"evaluation\.onnx\.size: got 32 .*, expected 16x16, which it takes"),
        ("graph", {"mean": (0.5,) * 4}, UsageError, r"mean, std: got 4 and 3 numbers, expected one for each of the 3 channels"),
        ("without its data", {}, DataError, r"net\.onnx: .*\.data cannot be read"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_serve_is_refused_in_one_line(file, tmp_path, content, settings, error, said):
    path = tmp_path / "net.onnx"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "one image":
        export(path, batch=False)
    elif content is not None:
        shutil.copytree(file.parent, tmp_path, dirs_exist_ok=True)
        (tmp_path / file.name).rename(path)
    if content == "without its data":
        next(tmp_path.glob("*.data")).unlink()
    with pytest.raises(error, match=said) as caught:
        OnnxExtractor(path, SETTINGS.model_copy(update=settings))
    assert isinstance(caught.value, PipelineError)
    assert "\n" not in str(caught.value)


def test_images_of_other_channels_and_the_inception_score_are_refused(file, images, tmp_path):
    with pytest.raises(RefusedError, match="judges images of 3 channels, got 2"):
        OnnxExtractor(file, SETTINGS).resize_rule((2, 8, 8))
    asked = EvaluationConfig(extractor=str(file), onnx=SETTINGS, metrics=("fid", "is"), num_images=20)
    with pytest.raises(RefusedError, match="got is, which needs logits, but onnx_tiny_net has none"):
        scorer_of(ArraySet(images), asked, tmp_path)


def test_a_score_carries_the_files_hash_and_how_images_were_prepared(file, images, tmp_path):
    asked = EvaluationConfig(extractor=str(file), onnx=SETTINGS, num_images=20)
    scorer = scorer_of(ArraySet(images), asked, tmp_path)
    identity = scorer.identity("fid", "", Generation("ddim", steps=5), 20)
    assert identity.key == "fid_onnx_tiny_net_n20"
    assert identity.extractor_sha256 == OnnxExtractor(file, SETTINGS).sha256
    assert "bicubic to 16x16 with antialias" in identity.resize


@pytest.mark.parametrize("value", ["dinov2", "net.pt"])
def test_other_words_are_refused_with_what_is_expected(value):
    with pytest.raises(ValueError, match=r"expected auto, classifier, inception, or the path of an \.onnx file"):
        EvaluationConfig(extractor=value)
