"""What provisions clusters: the files for KubeRay and the cluster launcher against their schemas, and against their profiles."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import requests
import yaml
from ray._private import ray_constants

from pipeline.config.cluster_profile import load_profile

CLUSTER = Path(__file__).resolve().parents[3] / "cluster"
BESIDE = CLUSTER.parent.parent / "shared" / "schemas"
RAY_KINDS = {"raycluster.yaml": "ray.io_rayclusters.yaml", "rayjob.yaml": "ray.io_rayjobs.yaml"}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def unknown_fields(content: Any, schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """Yield the fields that Kubernetes would drop without a word."""
    if isinstance(content, list):
        for item in content:
            yield from unknown_fields(item, schema.get("items", {}), path)
    elif isinstance(content, dict) and "properties" in schema and "additionalProperties" not in schema:
        for key, value in content.items():
            if key not in schema["properties"] and not schema.get("x-kubernetes-preserve-unknown-fields"):
                yield f"{path}.{key}"
            else:
                yield from unknown_fields(value, schema["properties"].get(key, {}), f"{path}.{key}")


@pytest.mark.slow
@pytest.mark.parametrize("name", RAY_KINDS)
def test_ray_manifests_fit_kuberays_own_definitions(name):
    folder = Path(os.environ.get("DDPM_PIPE_TEST_SCHEMAS", BESIDE))
    if not folder.is_dir():
        pytest.skip("no definitions of KubeRay's here: name their folder in DDPM_PIPE_TEST_SCHEMAS")
    definition = yaml.safe_load((folder / RAY_KINDS[name]).read_text())
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == "v1")
    schema["properties"]["metadata"] = {"type": "object"}
    (content,) = documents(f"kuberay/{name}")
    jsonschema.validate(content, schema)
    assert list(unknown_fields(content, schema)) == []


def cluster_specs() -> list[dict[str, Any]]:
    (cluster,), (job,) = documents("kuberay/raycluster.yaml"), documents("kuberay/rayjob.yaml")
    return [cluster["spec"], job["spec"]["rayClusterSpec"]]


@pytest.mark.parametrize("spec", cluster_specs(), ids=["cluster", "job"])
def test_clusters_ask_for_a_token_run_this_ray_and_need_no_privilege(spec):
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == version("ray")
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        assert container["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
        assert {"secretRef": {"name": "object-store"}} in container["envFrom"]
    assert spec["headGroupSpec"].get("serviceType", "ClusterIP") == "ClusterIP"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_a_pod_holds_a_worker_of_the_profile_and_the_group_holds_all_of_them():
    profile = load_profile("kuberay")
    (group,) = cluster_specs()[0]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert float(limits["cpu"]) >= profile.resources_per_worker.CPU
    assert float(limits["nvidia.com/gpu"]) >= profile.resources_per_worker.GPU
    assert group["maxReplicas"] >= profile.most_workers


@pytest.mark.parametrize("spec", cluster_specs(), ids=["cluster", "job"])
def test_a_pod_that_is_taken_away_has_time_to_announce_it_and_training_to_save(spec):
    (group,) = spec["workerGroupSpecs"]
    pod = group["template"]["spec"]
    env = {item["name"]: item["value"] for item in pod["containers"][0]["env"]}
    announced_s = float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])  # which this Ray knows:
    assert hasattr(ray_constants, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
    assert load_profile("kuberay").timeouts.stop_s < announced_s < pod["terminationGracePeriodSeconds"]


def test_services_are_those_that_profile_and_pods_name():
    parts = documents("kuberay/services.yaml")
    services = {
        part["metadata"]["name"]: part["spec"]["ports"][0]["port"] for part in parts if part["kind"] == "Service"
    }
    profile = load_profile("kuberay")
    assert profile.mlflow.tracking_uri == f"http://mlflow:{services['mlflow']}"
    (mlflow,) = (part for part in parts if part["kind"] == "Deployment")
    env = {item["name"]: item.get("value") for item in mlflow["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env["MLFLOW_BACKEND_STORE_URI"].startswith("postgresql://mlflow:$(POSTGRES_PASSWORD)@postgres:")
    assert str(profile.storage).split("/")[2] == env["MLFLOW_ARTIFACTS_DESTINATION"].split("/")[2]
    assert "mlflow:5000" in env["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    endpoint = f"http://object-store:{services['object-store']}"
    assert env["MLFLOW_S3_ENDPOINT_URL"] == endpoint
    for spec in cluster_specs():
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            assert {"name": "AWS_ENDPOINT_URL", "value": endpoint} in group["template"]["spec"]["containers"][0]["env"]
    (policy,) = (part for part in parts if part["kind"] == "NetworkPolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress"]


def test_no_manifest_holds_a_secret():
    for path in CLUSTER.rglob("*.yaml"):
        for line in path.read_text().splitlines():
            assert not re.search(r"(?i)(password|secret_access_key|token):\s*[\"']?[A-Za-z0-9+/]{8,}", line), (
                f"{path.name}: {line}"
            )
    assert all(part["kind"] != "Secret" for part in documents("kuberay/services.yaml"))


def test_the_launchers_file_fits_the_launchers_schema_and_its_profile():
    import ray

    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    (content,) = documents("aws/cluster.yaml")
    jsonschema.validate(content, schema)
    profile, types = load_profile("aws"), content["available_node_types"]
    assert content["head_node_type"] in types
    assert types["gpu"]["resources"] == {
        "CPU": profile.resources_per_worker.CPU,
        "GPU": profile.resources_per_worker.GPU,
    }
    assert types["gpu"]["max_workers"] >= profile.most_workers
    starts = [
        line
        for line in content["head_start_ray_commands"] + content["worker_start_ray_commands"]
        if "ray start" in line
    ]
    assert len(starts) == 2
    assert all(line.startswith("RAY_AUTH_MODE=token ") for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "/home/ubuntu/.ray/auth_token" in content["file_mounts"]
    bucket = str(profile.storage).split("/")[2]
    assert f"s3://{bucket}/mlflow" in (CLUSTER / "aws" / "cluster.yaml").read_text()


def test_every_head_that_we_write_or_start_reports_to_nobody(monkeypatch):
    """Ray's dashboard contacts the host of its usage statistics even where they are switched off: to say so."""
    from ray._common.usage import usage_lib

    from pipeline.cluster.session import LOCAL_SETTINGS

    (name,) = {name for name in LOCAL_SETTINGS if name.endswith("REPORT_URL")}
    setting = f"{name}={LOCAL_SETTINGS[name]}"
    (launched,) = (
        line for line in documents("aws/cluster.yaml")[0]["head_start_ray_commands"] if "ray start --head" in line
    )
    assert setting in launched.split()
    image = re.search(r"^ENV .*RAY_USAGE_STATS_ENABLED=0.*$", (CLUSTER / "kuberay" / "Dockerfile").read_text(), re.M)
    assert image is not None
    assert setting in image[0].split()
    by_hand = (CLUSTER / "README.md").read_text().partition("ray start --head")[0].rpartition("```sh")[2]
    assert re.search(rf"^export .*\b{re.escape(setting)}\b", by_hand, re.M)
    for spec in cluster_specs():  # pods take it from the image
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            assert group["template"]["spec"]["containers"][0]["image"].rpartition("/")[2].startswith("ddpm-pipe:")

    monkeypatch.setenv(name, LOCAL_SETTINGS[name])
    with pytest.raises(requests.exceptions.MissingSchema):  # before any connection
        usage_lib.UsageReportClient().report_usage_data(
            usage_lib._usage_stats_report_url(), usage_lib.generate_disabled_report_data()
        )


def test_the_image_is_made_from_the_locked_environment():
    text = (CLUSTER / "kuberay" / "Dockerfile").read_text()
    assert "--require-hashes" in text
    assert "USER ray" in text
    assert "python:3.11" in text
