"""The logic of benchmarks/gpu.sh, with a tiny network on the CPU: which rows are run, what is chosen, and what a failure costs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import NOT_RUN, Row, Sizes, Work, best_of, in_process, rows, run, table
from tests.kit import forks

TINY = Sizes(
    preset="digits",
    settings=("model.channels=8", "model.norm_groups=4", "model.num_res_blocks=1"),
    batch_size=4,
    large=(8, 16),
    sampled=4,
    sampling_steps=2,
    window_s=0.01,
    matrix=32,
)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def here(work: Work, limit_s: float) -> dict[str, Any]:
    return work()


def test_every_row_is_measured_or_marked(tmp_path: Path) -> None:
    cheap = [replace(row, needs_s=1e9 if "compiled" in row.name else 0) for row in rows(TINY)]
    found = run(cheap, TINY, 600, tmp_path / "gpu.json", here)
    assert json.loads((tmp_path / "gpu.json").read_text()) == json.loads(json.dumps(found))
    compiled = ["compiled" in row.name for row in cheap]
    assert [row["note"] == NOT_RUN for row in found["rows"]] == compiled
    assert ["images_per_s" in row for row in found["rows"]] == [not each for each in compiled]
    assert all(row["share"] > 0 for row in found["rows"] if not row["note"])
    large = [row for row in found["rows"] if row["like_the_best"]]
    assert [row["batch_size"] for row in large] == [8, 16]
    best = best_of(found["rows"])
    assert best is not None
    assert {tuple(row["settings"]) for row in large} == {tuple(best["settings"])}
    bf16 = next(row for row in found["rows"] if row["name"] == gpu.TUNED)
    assert (bf16["arithmetic"]["precision"], bf16["arithmetic"]["channels_last"]) == ("bf16", True)
    printed = table(found)
    assert printed.count("\n") == len(cheap) + 3
    assert printed.count(NOT_RUN) == sum(compiled)


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    def unwanted(work: Work, limit_s: float) -> dict[str, Any]:
        assert work.func is gpu.card  # type: ignore[attr-defined]
        return {"note": "none"}

    found = run(rows(TINY), TINY, 1, tmp_path / "gpu.json", unwanted)
    assert {row["note"] for row in found["rows"]} == {NOT_RUN}


def test_the_best_repeats_and_is_of_the_usual_batch() -> None:
    def row(
        name: str, per_s: float, *settings: str, work: str = "train", like_the_best: bool = False
    ) -> dict[str, Any]:
        of_row = {"work": work, "name": name, "settings": settings, "like_the_best": like_the_best}
        return of_row | {"images_per_s": {"median": per_s}}

    slow, fast = row("slow", 1), row("fast", 2)
    faster = [
        row("not deterministic", 3, "training.deterministic=false"),
        row("peer", 4, work="train diffusers"),
        row("large", 5, like_the_best=True),
        {"work": "train", "note": NOT_RUN},
    ]
    assert best_of([slow, *faster, fast]) == fast
    assert best_of(faster[-1:]) is None


def test_a_row_that_fails_costs_no_other(tmp_path: Path) -> None:
    assert forks.PROCESSES  # the server that has torch imported
    assert in_process(partial(dict, a=1), 60) == {"a": 1}
    assert in_process(partial(os._exit, 7), 60)["note"] == "failed: its process ended with exit code 7"
    assert "failed: ZeroDivisionError" in in_process(partial(divmod, 1, 0), 60)["note"]
    assert in_process(partial(time.sleep, 60), 0.1)["note"] == "stopped: it took longer than there was time"
    few = [Row("train", "no such setting", 4, ("training.nonsense=1",), 0), Row("train", "fp32", 4, gpu.FP32, 0)]

    def caught(work: Work, limit_s: float) -> dict[str, Any]:
        try:
            return work()
        except Exception as error:
            return {"note": f"failed: {error}"}

    first, second = run(few, TINY, 600, tmp_path / "gpu.json", caught)["rows"]
    assert "nonsense" in first["note"]
    assert second["images_per_s"]["median"] > 0
