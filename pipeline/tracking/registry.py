"""Register the best model of a dataset in the MLflow Model Registry, under an alias that names the criterion."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipeline.metrics.metric_identity import LUCK
from pipeline.redaction import one_line

log = logging.getLogger(__name__)
VALUE_TAG = "ddpm_pipe.value"
IDENTITY_TAG = "ddpm_pipe.identity"
SWEEP_TAG = "ddpm_pipe.sweep"


def alias_of(identity: Mapping[str, Any]) -> str:
    """Return an alias such as `best-fid-classifier-n559-ddim50-1a2b3c4d`, equal exactly for comparable values."""
    kept = {name: value for name, value in identity.items() if name != "generation"}
    generation = dict(identity.get("generation", {}))
    kept["generation"] = {name: value for name, value in generation.items() if f"generation.{name}" not in LUCK}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]
    words = [
        "best",
        identity["metric"],
        identity.get("extractor", ""),
        f"n{identity['num_images']}" if "num_images" in identity else "",
    ]
    words += [f"{generation['sampler']}{generation['steps']}"] if generation else []
    text = "-".join(re.sub(r"[^A-Za-z0-9]+", "-", str(word)) for word in words if word)
    return f"{text}-{digest}"


def register(
    uri: str,
    mlflow_run_id: str,
    name: str,
    alias: str,
    *,
    sweep: str,
    value: float,
    spoken: str,
    about: Mapping[str, str],
    identity: Mapping[str, Any],
) -> str | None:
    """Register the model of a sweep's best run, and assign the alias to the model with the lowest value; return a line about it.

    `value` decides the alias, `spoken` describes it; `about` are tags. A model that the sweep registered before keeps its version but loses
    its value, because the sweep now ranks another one first. Registering the same model again changes nothing. Returns None if the store
    does not answer or has no model of the run.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        run = client.get_run(mlflow_run_id)
        models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{mlflow_run_id}'")
        if not models:
            return None
        version = _version(client, name, mlflow_run_id, models[0].model_id)
        tags = {f"ddpm_pipe.{key}": text for key, text in about.items()}
        tags |= {SWEEP_TAG: sweep, VALUE_TAG: repr(value), IDENTITY_TAG: json.dumps(identity)}
        for key, text in tags.items():
            client.set_model_version_tag(name, version, key, text)
        client.update_model_version(name, version, spoken)
        holder = version
        for other, scored in _others(client, name, alias, version, sweep):
            if scored < value:
                holder, value = other, scored
        client.set_registered_model_alias(name, alias, holder)
    except (MlflowException, OSError) as error:
        log.warning("the model registry: %s", one_line(error))
        return None
    if holder != version:
        return f"registered models:/{name}/{version}; @{alias} is that of version {holder}, which scored {value:.4g}"
    return f"registered models:/{name}@{alias} (version {version})"


def _version(client: Any, name: str, mlflow_run_id: str, model_id: str) -> str:
    """Return the version of a run's model, created if it is missing."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(
            name,
            description="Denoising diffusion models, by ddpm-pipe; aliases name the criterion by which each is best.",
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.run_id == mlflow_run_id:
            return str(version.version)
    with _as_default(client.tracking_uri):
        made = client.create_model_version(name, f"models:/{model_id}", run_id=mlflow_run_id, model_id=model_id)
    return str(made.version)


@contextmanager
def _as_default(uri: str) -> Iterator[None]:
    """Make a store MLflow's default: the registry of a database looks up models in the default store, not in its client's."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    try:
        yield
    finally:
        if before is None:
            del os.environ["MLFLOW_TRACKING_URI"]
        else:
            os.environ["MLFLOW_TRACKING_URI"] = before


def _others(client: Any, name: str, alias: str, version: str, sweep: str) -> Iterator[tuple[str, float]]:
    """Yield (version, value) of other models with this alias; remove the value of models that the sweep supersedes."""
    for other in client.search_model_versions(f"name = '{name}'"):
        tags, number = other.tags, str(other.version)
        if number == version or not {VALUE_TAG, IDENTITY_TAG} <= tags.keys():
            continue
        if alias_of(json.loads(tags[IDENTITY_TAG])) != alias:
            continue
        if tags.get(SWEEP_TAG) == sweep:
            client.delete_model_version_tag(name, number, VALUE_TAG)
        else:
            yield number, float(tags[VALUE_TAG])
