"""No figure depends on what a shell says of threads, and none of those that profiles share on a profile's: compared bit by bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.cluster_profile import Profile
from pipeline.errors import UsageError
from pipeline.metrics.classifier import SmallNetwork
from pipeline.metrics.classifier_fit import fit
from pipeline.metrics.classifier_store import classifier_for
from pipeline.metrics.fid import Moments, frechet_distance, inception_score, kid
from pipeline.metrics.inception import Inception
from pipeline.metrics.prdc import prdc
from pipeline.metrics.reference import prepare_reference
from pipeline.training.device import sampling_compute
from pipeline.training.threads import spread
from tests.kit.array_set import digits

VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@pytest.mark.slow
def test_an_evaluation_gives_the_same_bytes_whatever_the_environment_says_of_threads(tmp_path: Path) -> None:
    """A training with its evaluation by features of width 32, and distances of features of width 2,048, each in a home of its own."""
    outputs = []
    for number in ("1", "2", None):
        home = tmp_path / f"home-{number}"
        home.mkdir()
        environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        environment |= {} if number is None else dict.fromkeys(VARIABLES, number)
        command = [sys.executable, "-m", "tests.kit.figures", str(home)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, timeout=600)
        outputs.append(json.loads(done.stdout))
    first = outputs[0]
    assert first["threads"] == 2
    assert first["losses"]
    assert {"fid_classifier_n128", "kid_classifier_n128"} < first["scores"]["values"].keys()
    for other in outputs[1:]:
        for part in first:
            assert other[part] == first[part], part


FEATURES = np.random.default_rng(0).normal(size=(400, 257))
OTHERS = np.random.default_rng(1).normal(0.1, 1.1, size=(400, 257))


def _inception() -> Any:
    """A network in Inception's place, whose batches are Inception's own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = SmallNetwork((3, 16, 16), 10, 64)
    images = np.random.default_rng(0).integers(0, 256, (100, 3, 16, 16), dtype=np.uint8)
    return Inception(network, "")(images)


@pytest.mark.parametrize(
    "compute",
    [
        lambda folder: Moments.of(FEATURES).scatter,
        lambda folder: frechet_distance(Moments.of(FEATURES), Moments.of(OTHERS)),
        lambda folder: vars(kid(FEATURES, OTHERS, num_subsets=7, subset_size=200)),
        lambda folder: inception_score(FEATURES),
        lambda folder: prdc(FEATURES, OTHERS),
        lambda folder: _inception(),
        lambda folder: fit(digits().images, digits().labels(np.arange(1797)), 10, width=32, num_steps=3).state_dict(),
        lambda folder: [path.read_bytes() for path in _kept(folder)],
    ],
    ids=["moments", "fid", "kid", "is", "prdc", "inception", "fit", "reference"],
)
def test_what_profiles_share_is_the_same_on_any_number_of_threads(
    tmp_path: Path, compute: Callable[[Path], Any]
) -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(compute(tmp_path / str(threads)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        np.testing.assert_equal(_plain(other), _plain(found[0]))


def _kept(folder: Path) -> list[Path]:
    """Prepare a reference, and return the files that keep it."""
    prepare_reference(digits(), classifier_for(digits(), folder), 200, folder)
    return sorted(folder.glob("*.safetensors"))


def _plain(found: Any) -> Any:
    if isinstance(found, torch.Tensor):
        return found.numpy()
    if isinstance(found, dict):
        return {name: _plain(value) for name, value in found.items()}
    return found


def test_parts_are_computed_at_the_same_time_each_on_one_thread_and_come_in_order() -> None:
    before, meeting = torch.get_num_threads(), threading.Barrier(3)

    def compute(part: int) -> tuple[int, int, bool]:
        meeting.wait(timeout=60)  # broken unless three compute at once
        return part, torch.get_num_threads(), torch.is_inference_mode_enabled()

    try:
        torch.set_num_threads(3)
        with torch.inference_mode():
            assert spread(compute, range(6)) == [(part, 1, True) for part in range(6)]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "value"), [("OMP_THREAD_LIMIT", "1"), ("OMP_DYNAMIC", "TRUE")])
def test_a_variable_that_takes_threads_away_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=name):
        sampling_compute(Profile(threads_per_worker=2)).start()
    before = torch.get_num_threads()
    try:
        sampling_compute(Profile(threads_per_worker=1)).start()
    finally:
        torch.set_num_threads(before)
