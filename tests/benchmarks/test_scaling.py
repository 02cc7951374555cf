"""The scaling model against published measurements, and against hand-worked figures of the same formulas."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.scaling import CIFAR, LSUN, ROWS, between, least_batch, validation
from benchmarks.scaling import NETWORKS as PAPER
from benchmarks.scaling_model import (
    BUCKET_BYTES,
    FIRST_BUCKET_BYTES,
    Link,
    Network,
    Work,
    buckets,
    checkpoint_interval_s,
    efficiency,
    lost_share,
    mean_time_to_failure_s,
    sampling_s,
    speedup,
    step_s,
    weak_efficiency,
)
from tests.kit.drawings import pixels_of

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("point", validation(), ids=lambda p: f"{p.resolution} on {p.gpus}")
def test_each_published_measurement_is_met_within_a_tenth(point):
    assert abs(point.error) < 0.10, f"published {point.published}, model {point.predicted:.0f}"


def test_the_eight_published_points_include_the_knee():
    assert len(validation()) == 8
    knee = next(p for p in validation() if (p.resolution, p.gpus) == ("256px", 128))
    assert knee.published / 128 / (1100 / 8) == pytest.approx(0.66, abs=0.005)  # the published efficiency
    assert knee.predicted / 128 / (1100 / 8) == pytest.approx(0.66, abs=0.05)


# Worked out apart from this code, when the project was designed, with the same published and assumed inputs: 5,400 and 133 images/s
# for each GPU, 1 % jitter, 300 GB/s within a node, 6 us a hop, float32 gradients. Columns: 8 nodes at 50 GB/s, 64 at 50, 29.6, 7 and 2.
DESIGN = {
    ("32px, 35.7 M", 512): (0.988, 0.981, 0.978, 0.953, 0.51),
    ("32px, 35.7 M", 128): (0.976, 0.968, 0.956, 0.46, 0.16),
    ("32px, 35.7 M", 16): (0.42, 0.41, 0.27, 0.07, 0.02),
    ("256px, 113.7 M", 16): (0.989, 0.983, 0.981, 0.68, 0.24),
    ("256px, 113.7 M", 4): (0.982, 0.956, 0.69, 0.22, 0.07),
}


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_efficiencies_are_those_of_the_design(row):
    name, batch = row
    columns = [(64, 50.0), (512, 50.0), (512, 29.6), (512, 7.0), (512, 2.0)]
    found = [weak_efficiency(PAPER[name], batch, gpus, between(b)) for gpus, b in columns]
    assert found == pytest.approx(DESIGN[row], abs=0.015)


def test_the_papers_own_batches_do_not_scale():
    assert speedup(CIFAR, 128, 16, between(50)) < 1, "32x32 at a batch of 128 is slower from the second node on"
    assert efficiency(LSUN, 64, 32, between(50)) == pytest.approx(0.62, abs=0.01)  # 256x256 at 64, four nodes


def test_the_least_batches_are_those_of_the_design_within_a_tenth():
    found = [least_batch(work, 512, b) for work in (CIFAR, LSUN) for b in (50.0, 29.6, 7.0)]
    assert found == pytest.approx([180, 281, 1078, 5, 7, 27], rel=0.1)


def test_one_worker_takes_its_arithmetic_or_its_data():
    work = Work(1000, image_s=0.01, fixed_s=0.5, data_images_per_s=50.0)
    assert step_s(work, 10, 1, between(50)) == pytest.approx(0.6)  # 0.5 + 10 x 0.01
    assert step_s(work, 100, 1, between(50)) == pytest.approx(2.0)  # 100 images at 50 a second


def test_a_gradient_of_one_bucket_cannot_be_hidden():
    link = Link(bytes_per_s=1e6, latency_s=0.0)
    work = Work(1000, image_s=1.0, jitter=0.0)  # 4,000 bytes: (n-1)/n * 2 * 4000 / 1e6 = 6 ms for four workers
    assert step_s(work, 1, 4, Network(4, link, link)) == pytest.approx(1.006)


def test_a_gradient_of_many_buckets_is_hidden_but_for_the_last():
    sent = FIRST_BUCKET_BYTES + 4 * BUCKET_BYTES  # 101 MiB in five buckets
    link = Link(bytes_per_s=float(sent), latency_s=0.0)  # n = 2: the whole gradient takes one second
    slow = Work(sent // 4, image_s=100.0, jitter=0.0)
    assert step_s(slow, 1, 2, Network(2, link, link)) == pytest.approx(100 + 25 / 101)
    # with 0.9 s of arithmetic 2/3 x 0.9 x 4/5 = 0.48 s of the first four buckets' 76/101 s are hidden
    quick = Work(sent // 4, image_s=0.9, jitter=0.0)
    assert step_s(quick, 1, 2, Network(2, link, link)) == pytest.approx(0.9 + (76 / 101 - 0.48) + 25 / 101)


@pytest.mark.parametrize("num_bytes", [1000, FIRST_BUCKET_BYTES, FIRST_BUCKET_BYTES + 1, 142_800_000])
def test_buckets_hold_all_bytes(num_bytes):
    sizes = buckets(num_bytes)
    assert sum(sizes) == num_bytes
    assert sizes[0] <= FIRST_BUCKET_BYTES
    assert all(0 < size <= BUCKET_BYTES for size in sizes)


def test_jitter_is_the_expected_slowest_of_many():
    """sqrt(2 ln n) is an upper bound that the mean of the maximum of n normals comes near to: for n = 512, 3.04 against 3.53."""
    still, shaky = Work(1, 1.0, jitter=0.0), Work(1, 1.0, jitter=0.01)
    link = Link(1e15, 0.0)
    added = step_s(shaky, 1, 512, Network(8, link, link)) - step_s(still, 1, 512, Network(8, link, link))
    assert 0.0304 < added < 0.0304 * 1.2


def test_youngs_interval_is_where_the_least_is_lost():
    for checkpoint, failure in ((0.2, 15.8 * 3600), (7.0, 3600.0), (21.0, 1e6)):
        best = checkpoint_interval_s(checkpoint, failure)
        at_best = lost_share(checkpoint, best, failure)
        assert all(at_best < lost_share(checkpoint, best * k, failure) for k in (0.5, 0.9, 1.1, 2.0))


@pytest.mark.parametrize(
    ("checkpoint_s", "hours", "interval_s", "lost"),
    [
        (0.2, 15.8, None, 0.0048),
        (7.0, 15.8, None, 0.018),
        (21.0, 15.8, None, 0.029),
        (0.2, 15.8, 3600.0, 0.034),
        (0.2, 1.0, None, 0.044),  # spot machines, one loss an hour
        (7.0, 1.0, None, 0.096),
        (0.2, 1.0, 3600.0, 0.53),
    ],
)
def test_lost_time_is_that_of_the_design(checkpoint_s, hours, interval_s, lost):
    failure = hours * 3600
    every = interval_s or checkpoint_interval_s(checkpoint_s, failure)
    assert lost_share(checkpoint_s, every, failure) == pytest.approx(lost, rel=0.04)


def test_failures_come_more_often_with_more_workers():
    assert mean_time_to_failure_s(1024) == pytest.approx(7.9 * 3600, rel=0.001)  # the published figure
    assert mean_time_to_failure_s(512) == 2 * mean_time_to_failure_s(1024)
    assert lost_share(1e9, 1.0, 1.0) == 1.0


def test_sampling_shares_nothing():
    assert sampling_s(50_000, 1000, 16_200, 1) / 60 == pytest.approx(51, abs=0.5)
    assert sampling_s(3, 10, 10.0, 2) == 2.0  # one of the two draws two images
    assert math.isclose(sampling_s(64, 10, 10.0, 64), 1.0)


def test_the_command_prints_its_tables_and_draws_its_picture(tmp_path):
    script = REPOSITORY / "benchmarks" / "scaling.py"
    tables = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    document = (REPOSITORY / "docs" / "scaling.md").read_text()
    printed = [line for line in tables.splitlines() if line.startswith("| ") and "---" not in line]
    missing = [line for line in printed if line not in document]
    assert not missing, f"docs/scaling.md does not show what the command prints: {missing}"
    subprocess.run([sys.executable, script, "--figure", tmp_path / "s.png"], capture_output=True, check=True)
    drawn, shown = (
        pixels_of(path, "RGBA").astype(float) for path in (tmp_path / "s.png", REPOSITORY / "docs" / "scaling.png")
    )
    assert drawn.shape == shown.shape
    assert np.abs(drawn - shown).mean() < 0.1  # other libraries may round the edges of letters another way
