"""The chart as Helm renders it: Kubernetes takes it, and servers take what it tells them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.files import CHART, CONFIG, DEPLOY, check_probes, loaded, settings_of

helm = pytest.importorskip("helm_python", reason="make test-deploy has it")
kubernetes = pytest.importorskip("kubernetes_validate", reason="make test-deploy has it")

VERSIONS = ["1.29.0", "1.33.0"]
EVERYTHING = {
    "secretName": "secrets",
    "env": [{"name": "AWS_REGION", "value": "eu-central-1"}],
    "imagePullSecrets": [{"name": "registry"}],
    "podDisruptionBudget": {"enabled": True, "maxUnavailable": "25%"},
    "autoscaling": {"enabled": True, "maxReplicas": 8},
    "serviceMonitor": {"enabled": True, "bearerTokenKey": "LORASERVE_ADMIN_KEY"},
    "cache": {"persistent": True, "accessModes": ["ReadWriteMany"], "storageClass": "nfs"},
    "podAnnotations": {"a": "b"},
    "podLabels": {"team": "x"},
    "nodeSelector": {"kubernetes.io/arch": "amd64"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "runtimeClassName": "nvidia",
    "resources": {"limits": {"nvidia.com/gpu": 1}},
}
CASES: list[dict[str, Any]] = [{}, EVERYTHING, {"cache": {"persistent": False}, "replicaCount": 3}]


def rendered(values: dict[str, Any], name: str = "release") -> dict[str, dict[str, Any]]:
    """By kind."""
    files = helm.Chart.load(str(CHART)).render(values, name=name, namespace="models")
    found = [yaml.safe_load(text) for path, text in files.items() if path.endswith(".yaml") and text.strip()]
    return {one["kind"]: one for one in found}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("values", CASES)
def test_kubernetes_takes_what_is_rendered(values: dict[str, Any], version: str) -> None:
    for kind, one in rendered(values).items():
        if kind != "ServiceMonitor":  # of Prometheus' operator, whose schema is not Kubernetes'
            kubernetes.validate(one, version, strict=True)


def test_a_wrong_field_would_be_found() -> None:
    deployment = rendered({})["Deployment"]
    deployment["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(kubernetes.ValidationError):
        kubernetes.validate(deployment, VERSIONS[-1], strict=True)


def test_what_is_off_is_not_rendered_and_what_is_on_is() -> None:
    always = {"ConfigMap", "Deployment", "Service", "PersistentVolumeClaim"}
    assert rendered({}).keys() == always
    assert rendered(EVERYTHING).keys() == always | {
        "PodDisruptionBudget",
        "HorizontalPodAutoscaler",
        "ServiceMonitor",
    }


def test_the_server_takes_its_settings_and_ports(tmp_path: Path) -> None:
    told = {"settings": {"model": "org/model", "adapters": {"sql": "s3://bucket/sql"}, "max_num_seqs": 64}}
    found = rendered(told)
    pod = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    settings = settings_of(container["args"], {}, tmp_path, found["ConfigMap"]["data"]["loraserve.yaml"])
    assert (settings.model, settings.max_num_seqs, settings.host) == ("org/model", 64, "0.0.0.0")
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": settings.http_port, "grpc": settings.grpc_port}
    assert {port["targetPort"] for port in found["Service"]["spec"]["ports"]} == set(ports)
    check_probes(container, set(ports))
    assert pod["terminationGracePeriodSeconds"] > settings.drain_seconds
    (settings_volume,) = [one for one in container["volumeMounts"] if one["name"] == "settings"]
    assert CONFIG.startswith(settings_volume["mountPath"])


def test_pods_are_found_by_everything_that_selects_them() -> None:
    found = rendered(EVERYTHING)
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        found["Service"]["spec"]["selector"],
        *(found[kind]["spec"]["selector"]["matchLabels"] for kind in ("Deployment", "PodDisruptionBudget")),
    ]
    for selector in selectors:
        assert selector.items() <= labels.items()
    monitor = found["ServiceMonitor"]["spec"]["selector"]["matchLabels"]
    assert monitor.items() <= found["Service"]["metadata"]["labels"].items()
    assert (
        found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"]
        == found["Deployment"]["metadata"]["name"]
    )


def test_a_changed_setting_restarts_pods_and_one_writer_is_let_go_first() -> None:
    def template(values: dict[str, Any]) -> Any:
        return rendered(values)["Deployment"]["spec"]["template"]["metadata"]["annotations"]

    assert template({"settings": {"model": "a"}}) != template({"settings": {"model": "b"}})
    assert rendered({})["Deployment"]["spec"]["strategy"] == {"type": "Recreate"}
    assert "strategy" not in rendered(EVERYTHING)["Deployment"]["spec"]


@pytest.mark.parametrize(
    "values",
    [
        {"settings": {"model": ""}},
        {"settings": {"model": "x", "http_port": 9000}},
        {"replicas": 3},
        {"cache": {"size": "big"}},
        {"service": {"type": "Everywhere"}},
        {"autoscaling": {"targetCPUUtilizationPercentage": 200}},
        {"serviceMonitor": {"enabled": True, "bearerTokenKey": "KEY"}},  # of no secret
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(helm.HelmError):
        rendered(values)


def test_helm_finds_nothing_to_mend() -> None:
    report = helm.lint(str(CHART), {}, strict=True)
    assert report["errors"] == []
    assert [one for one in report["messages"] if one["severity"] > 1] == []


def pods() -> list[Any]:
    """Pods within resources of other operators, as Kubernetes has them."""
    predictor = dict(loaded(DEPLOY / "kubernetes/kserve.yaml")["spec"]["predictor"])
    del predictor["minReplicas"], predictor["maxReplicas"]
    cluster = loaded(DEPLOY / "kubernetes/rayservice.yaml")["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [predictor, *(group["template"]["spec"] for group in groups)]


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_the_pods_of_kserve_and_kuberay(version: str) -> None:
    for spec in pods():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
        kubernetes.validate(pod, version, strict=True)
