"""The model registry on a real store: an alias goes to the better of two models, by the value that it is given by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from pipeline.metrics.metric_identity import Generation, MetricIdentity
from pipeline.storage.runs import Run
from pipeline.tracking.registry import alias_of, register
from pipeline.tracking.tracker import Tracker, TrackingSettings
from tests.kit.tracking import client_of

IDENTITY = asdict(
    MetricIdentity("fid", "", "classifier", "ab", "none", 128, 128, "all", "images", Generation("ddim", 4))
)
ALIAS = alias_of(IDENTITY)


@pytest.fixture
def enter(new_run: Callable[..., Run], store: TrackingSettings) -> Callable[..., str | None]:
    """Register a model under a value: of a run made now, unless `version` says which one is registered again."""
    runs: list[str] = []

    def call(value: float, sweep: str = "", version: int | None = None) -> str | None:
        if version is None:
            runs.append(run_with_model())
        mlflow_run_id = runs[-1 if version is None else version - 1]
        return register(
            store.uri,
            mlflow_run_id,
            "ddpm-digits",
            ALIAS,
            sweep=sweep or mlflow_run_id,
            value=value,
            spoken=f"mean over 2 seeds {value}",
            about={"point": "cosine"},
            identity=IDENTITY,
        )

    def run_with_model() -> str:
        run = new_run()
        tracker = Tracker(run.folder, store)
        tracker.start("model", {}, {}, "")
        assert tracker.close()
        client = client_of(store)
        found = client.get_run(run.mlflow_run_id)
        model = client.create_logged_model(found.info.experiment_id, "ddpm", source_run_id=run.mlflow_run_id)
        client.finalize_logged_model(model.model_id, "READY")
        return str(run.mlflow_run_id)

    return call


def holder(store: TrackingSettings) -> Any:
    return client_of(store).get_model_version_by_alias("ddpm-digits", ALIAS)


def test_an_alias_goes_to_the_better_model(enter: Callable[..., str | None], store: TrackingSettings) -> None:
    assert enter(2.0) == f"registered models:/ddpm-digits@{ALIAS} (version 1)"
    assert (str(holder(store).version), holder(store).description) == ("1", "mean over 2 seeds 2.0")
    told = enter(3.0)
    assert told is not None
    assert f"@{ALIAS} is that of version 1, which scored 2" in told
    assert str(holder(store).version) == "1"
    assert enter(1.0) == f"registered models:/ddpm-digits@{ALIAS} (version 3)"
    assert str(holder(store).version) == "3"


def test_with_more_seeds_the_alias_follows_what_the_sweep_ranks_first(
    enter: Callable[..., str | None], store: TrackingSettings
) -> None:
    enter(2.5, "grid")  # the best of two seeds each; of four its mean is 2.9
    assert enter(2.7, "grid") == f"registered models:/ddpm-digits@{ALIAS} (version 2)"
    assert str(holder(store).version) == "2"
    told = enter(2.6, "other")  # not held to 2.5, which is no more
    assert told == f"registered models:/ddpm-digits@{ALIAS} (version 3)"
    told = enter(2.8, "other", version=3)  # the holder itself got worse
    assert told == f"registered models:/ddpm-digits/3; @{ALIAS} is that of version 2, which scored 2.7"
    assert str(holder(store).version) == "2"
    assert enter(2.4, "grid", version=1) == f"registered models:/ddpm-digits@{ALIAS} (version 1)"
    assert enter(2.4, "grid", version=1) == f"registered models:/ddpm-digits@{ALIAS} (version 1)"  # again: the same


def test_values_that_compare_share_an_alias_and_no_others_do() -> None:
    def changed(**generation: Any) -> str:
        return alias_of({**IDENTITY, "generation": {**IDENTITY["generation"], **generation}})

    assert changed(seed=5, chunk=7) == ALIAS  # luck
    assert changed(eta=1.0) != ALIAS
    assert alias_of({**IDENTITY, "extractor_sha256": "cd"}) != ALIAS
