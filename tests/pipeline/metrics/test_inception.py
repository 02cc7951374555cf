"""The Inception extractor: equal to torch-fidelity's on the same weights, and safe against the file that holds them."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import DataError, RefusedError
from pipeline.metrics.features import extract, in_batches
from pipeline.metrics.inception import INCEPTION_SHA256, INCEPTION_URL, WEIGHTS_VARIABLE, Inception, read_weights
from pipeline.metrics.inception_network import InceptionV3, resized


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the real network, scaled so that the signal survives all layers."""
    generator = torch.Generator().manual_seed(0)
    state = InceptionV3().state_dict()
    for name, tensor in state.items():
        if name.endswith("conv.weight"):
            fan_in = tensor[0].numel()
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2 / fan_in) ** 0.5)
        elif name.endswith(("bn.running_var", "bn.weight")):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def extractor(weights: Path) -> Inception:
    return Inception.load(str(weights), sha256=sha256(weights.read_bytes()))


@pytest.fixture
def images() -> Any:
    return np.random.default_rng(1).integers(0, 256, size=(5, 3, 20, 24), dtype=np.uint8)


@pytest.fixture(autouse=True)
def no_weights_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Caches of this test's own, and no variable: whoever runs the tests may have the real weights."""
    monkeypatch.delenv(WEIGHTS_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.mark.slow
def test_equals_torch_fidelitys_network_on_the_same_weights(weights: Path, extractor: Inception, images: Any) -> None:
    """A peer that was ported from the graph by others; the same operations in the same order give the same bits here."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    peer = FeatureExtractorInceptionV3("peer", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights))
    with torch.no_grad():
        features, logits = peer(torch.from_numpy(images))
    got = extractor(images)
    assert got.logits is not None
    assert features.std() > 1e-3  # the random network does pass a signal
    np.testing.assert_allclose(got.features, features.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.logits, logits.numpy(), rtol=1e-5, atol=1e-4)
    assert {name: tensor.shape for name, tensor in peer.state_dict().items()} == {
        name: tensor.shape for name, tensor in InceptionV3().state_dict().items()
    }  # those of the published file
    assert got.features.shape == (5, extractor.width)
    assert got.logits.shape == (5, extractor.num_classes)
    assert got.features.dtype == got.logits.dtype == np.float32


@pytest.mark.parametrize("shape", [(20, 24), (299, 299), (333, 400)])
def test_images_are_resized_as_tensorflow_1_did(shape: tuple[int, int]) -> None:
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    x = torch.randint(0, 256, (2, 3, *shape), generator=torch.Generator().manual_seed(0)).float()
    theirs = interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
    torch.testing.assert_close(resized(x, 299), theirs, rtol=0, atol=1e-4)
    ramp = torch.arange(float(shape[1])).expand(1, 1, shape[0], shape[1])  # of which the value is the place
    expected = (torch.arange(299) * shape[1] / 299).clamp(max=shape[1] - 1)
    torch.testing.assert_close(resized(ramp, 299)[0, 0, 7], expected, rtol=0, atol=1e-4)


def test_gray_images_are_repeated_and_the_rule_says_so(extractor: Inception, images: Any) -> None:
    gray = images[:2, :1]
    np.testing.assert_array_equal(extractor(gray).features, extractor(np.repeat(gray, 3, axis=1)).features)
    assert "gray repeated" in extractor.resize_rule((1, 8, 8))
    assert "gray" not in extractor.resize_rule((3, 8, 8))
    with pytest.raises(RefusedError, match="1 or 3 channels, got 4"):
        extractor.resize_rule((4, 8, 8))
    with pytest.raises(ValueError, match="uint8"):
        extractor(images.astype(np.float32))


def test_no_image_is_dropped_whatever_the_batches(extractor: Inception, images: Any) -> None:
    """Trap 8: the last partial batch counts. Batch sizes differ by rounding alone."""
    whole = extractor(images).features
    seen: list[int] = []
    got = extract(extractor, in_batches(images, 2), seen.append)
    assert seen == [2, 4, 5]
    np.testing.assert_allclose(got.features, whole, rtol=1e-3, atol=1e-4)
    assert extract(extractor, []).features.shape == (0, 2048)


def test_identity_is_the_hash_of_the_file(weights: Path, extractor: Inception) -> None:
    assert extractor.sha256 == sha256(weights.read_bytes())


def test_published_hash_begins_as_the_published_name_says() -> None:
    """The file name of the release carries the first eight digits of its sha256, as torch.hub's convention has it."""
    assert INCEPTION_URL.endswith(f"-{INCEPTION_SHA256[:8]}.pth")
    assert len(INCEPTION_SHA256) == 64


def test_wrong_hash_is_refused_before_anything_is_read(weights: Path) -> None:
    with pytest.raises(DataError, match=f"sha256 is .*, expected {INCEPTION_SHA256[:16]}"):
        Inception.load(str(weights))


class Canary:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_pickle_canary_does_not_run(tmp_path: Path) -> None:
    canary, file = tmp_path / "ran", tmp_path / "weights.pth"
    torch.save({"Conv2d_1a_3x3.conv.weight": Canary(canary)}, file)
    with pytest.raises(DataError, match="tensors alone"):
        Inception.load(str(file), sha256=sha256(file.read_bytes()))
    file.write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(DataError, match="tensors alone"):
        Inception.load(str(file), sha256=sha256(file.read_bytes()))
    assert not canary.exists()
    torch.load(io.BytesIO(_saved(Canary(canary))), weights_only=False)  # proves that the canary works
    assert canary.exists()


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_saved({"fc.weight": torch.zeros(2, 2)}), "not the 2015-12-05 network"),
        (_saved(torch.zeros(3)), "dictionary of dense tensors"),
        (_saved({"fc.weight": torch.zeros(2, 2).to_sparse()}), "dense tensors"),
        (b"<html>not found</html>", "tensors alone"),
        (b"", "tensors alone"),
    ],
    ids=["other network", "one tensor", "sparse", "html", "empty"],
)
def test_files_of_another_kind_end_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        Inception.load(str(file), sha256=sha256(content))
    assert "\n" not in str(caught.value)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A web server on loopback that serves `tmp_path/served`."""
    (tmp_path / "served").mkdir()
    handler = functools.partial(_QuietHandler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


def test_a_url_is_fetched_once(tmp_path: Path, server: str) -> None:
    (tmp_path / "served" / "w.pth").write_bytes(b"weights")
    first = read_weights(f"{server}/w.pth", sha256=sha256(b"weights"))
    (tmp_path / "served" / "w.pth").unlink()
    assert first == b"weights" == read_weights(f"{server}/w.pth", sha256=sha256(b"weights"))
    assert len(list((tmp_path / "torch" / "hub" / "checkpoints").iterdir())) == 1


def test_a_url_that_serves_something_else_leaves_nothing_behind(tmp_path: Path, server: str) -> None:
    (tmp_path / "served" / "w.pth").write_bytes(b"something else")
    with pytest.raises(DataError, match="sha256 is"):
        read_weights(f"{server}/w.pth", sha256=sha256(b"weights"))
    assert not (tmp_path / "torch").exists()


@pytest.mark.parametrize(
    "url", ["{server}/absent.pth", "http://127.0.0.1:9/w.pth", "file:///etc/hostname", "ftp://x/y"]
)
def test_no_network_or_no_file_is_one_line_with_what_to_do(tmp_path: Path, server: str, url: str) -> None:
    with pytest.raises(DataError, match="Inception weights") as caught:
        read_weights(url.format(server=server), sha256=sha256(b"weights"))
    assert "\n" not in str(caught.value)


def test_without_weights_and_without_leave_to_download(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"no Inception weights here; .*{WEIGHTS_VARIABLE}"):
        Inception.load(download=False)
    with pytest.raises(DataError, match=r"absent\.pth: cannot be read"):
        Inception.load(str(tmp_path / "absent.pth"))


def test_weights_named_by_the_variable_and_weights_that_torch_fidelity_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "torch" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / INCEPTION_URL.rsplit("/", 1)[1]).write_bytes(b"from torch-fidelity")
    assert read_weights(sha256=sha256(b"from torch-fidelity"), download=False) == b"from torch-fidelity"
    (tmp_path / "named.pth").write_bytes(b"named")
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path / "named.pth"))
    assert read_weights(sha256=sha256(b"named"), download=False) == b"named"
