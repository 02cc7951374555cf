"""Threads, workers and pools are sized by the CPUs that this process may use: affinity mask and control groups, not the machine's count."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from pipeline import cpus
from pipeline.config.cluster_profile import Profile


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_an_affinity_mask_counts() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from pipeline.config.cluster_profile import Profile\n"
        "print(Profile().threads(1), Profile(workers=2).threads(2))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]


def test_those_that_slurm_gave_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without control groups a job would otherwise take the whole machine."""
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "1")
    assert cpus.usable_cpus() == 1
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "100000")
    assert cpus.usable_cpus() < 100000


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/job/step\n", {"job/step/cpu.max": "max 100000", "job/cpu.max": "300000 100000"}, 3),
        ("0::/job\n", {"job/cpu.max": "50000 100000"}, 1),
        ("0::/not/seen/here\n", {"cpu.max": "250000 100000"}, 2),
        ("0::/job\n", {"job/cpu.max": "max 100000"}, 8),
        (
            "4:cpu,cpuacct:/a\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "400000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
            4,
        ),
        ("4:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 8),
        ("7:memory:/a\n", {"a/cpu.max": "100000 100000"}, 8),
        ("0::/job\n", {"job/cpu.max": "damaged"}, 8),
    ],
)
def test_a_quota_of_the_control_group_counts(
    own: str, files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(content + "\n")
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(cpus, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(cpus, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert cpus.usable_cpus() == expected
    assert Profile().threads(1) == expected


@pytest.mark.parametrize(
    ("own", "files", "left"),
    [
        (
            "0::/a/b\n",
            {"a/memory.max": "5000", "a/memory.current": "4000", "a/memory.stat": "anon 9\ninactive_file 600"},
            1600,
        ),
        ("0::/a\n", {"a/memory.max": "max", "a/memory.current": "4000", "a/memory.stat": ""}, 9000),
        (
            "4:memory:/a\n",
            {
                "memory/a/memory.limit_in_bytes": "5000",
                "memory/a/memory.usage_in_bytes": "7000",
                "memory/a/memory.stat": "cache 0",
            },
            0,
        ),
        ("0::/a\n", {"a/memory.max": "damaged"}, 9000),
    ],
)
def test_a_memory_limit_of_the_control_group_counts(
    own: str, files: dict[str, str], left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(content + "\n")
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(cpus, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(cpus, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=9000))
    assert cpus.free_memory_bytes() == left
