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
from tests.pipeline.tracking.stores import client_of

IDENTITY = asdict(
    MetricIdentity("fid", "", "classifier", "ab", "none", 128, 128, "all", "images", Generation("ddim", 4))
)
ALIAS = alias_of(IDENTITY)


@pytest.fixture
def enter(new_run: Callable[..., Run], store: TrackingSettings) -> Callable[[float], str | None]:
    """Make a run with a logged model, and register it under a value."""

    def call(value: float) -> str | None:
        run = new_run()
        tracker = Tracker(run.folder, store)
        tracker.start(store.experiment, "model", {}, {}, "")
        assert tracker.close()
        client = client_of(store)
        found = client.get_run(run.mlflow_run_id)
        model = client.create_logged_model(found.info.experiment_id, "ddpm", source_run_id=run.mlflow_run_id)
        client.finalize_logged_model(model.model_id, "READY")
        return register(
            store.uri,
            str(run.mlflow_run_id),
            "ddpm-digits",
            ALIAS,
            value=value,
            spoken=f"mean over 2 seeds {value}",
            about={"point": "cosine"},
            identity=IDENTITY,
        )

    return call


def holder(store: TrackingSettings) -> Any:
    return client_of(store).get_model_version_by_alias("ddpm-digits", ALIAS)


def test_an_alias_goes_to_the_better_model(enter: Callable[[float], str | None], store: TrackingSettings) -> None:
    assert enter(2.0) == f"registered models:/ddpm-digits@{ALIAS} (version 1)"
    assert (str(holder(store).version), holder(store).description) == ("1", "mean over 2 seeds 2.0")
    told = enter(3.0)
    assert told is not None
    assert f"@{ALIAS} stays with version 1, which scored 2" in told
    assert str(holder(store).version) == "1"
    assert enter(1.0) == f"registered models:/ddpm-digits@{ALIAS} (version 3)"
    assert str(holder(store).version) == "3"


def test_values_that_compare_share_an_alias_and_no_others_do() -> None:
    def changed(**generation: Any) -> str:
        return alias_of({**IDENTITY, "generation": {**IDENTITY["generation"], **generation}})

    assert changed(seed=5, chunk=7) == ALIAS  # luck
    assert changed(eta=1.0) != ALIAS
    assert alias_of({**IDENTITY, "extractor_sha256": "cd"}) != ALIAS
