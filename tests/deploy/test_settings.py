"""What the files of `deploy/` tell servers are settings that there are, and their ports are asked."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from tests.deploy.files import CONFIG, DEPLOY, check_probes, loaded, settings_of

DOCKERFILE = (DEPLOY / "docker/Dockerfile").read_text().replace("\\\n", " ")
KSERVE = loaded(DEPLOY / "kubernetes/kserve.yaml")
RAY = loaded(DEPLOY / "kubernetes/rayservice.yaml")
COMPOSE = loaded(DEPLOY / "compose.yaml")


def image_environment() -> dict[str, str]:
    """Variables of the image's `ENV` lines."""
    found = re.findall(r"^ENV (.*)$", DOCKERFILE, re.MULTILINE)
    return dict(one.split("=", 1) for line in found for one in line.split())


def test_yaml_files_are_read() -> None:
    files = [path for path in DEPLOY.rglob("*.y*ml") if "templates" not in path.parts]
    assert len(files) >= 8
    for path in files:
        assert loaded(path), path


def test_the_image_serves_on_the_ports_that_it_exposes(tmp_path: Path) -> None:
    settings = settings_of(["model"], image_environment(), tmp_path)
    (ports,) = re.findall(r"^EXPOSE (.*)$", DOCKERFILE, re.MULTILINE)
    assert ports.split() == [str(settings.http_port), str(settings.grpc_port)]
    assert settings.host == "0.0.0.0"
    assert f"http://127.0.0.1:{settings.http_port}/health" in DOCKERFILE
    volume = re.findall(r"^VOLUME (.*)$", DOCKERFILE, re.MULTILINE)[0]
    assert settings.adapter_cache_dir.is_relative_to(volume)
    assert all(
        Path(image_environment()[name]).is_relative_to(volume) for name in ("HF_HOME", "LORASERVE_CACHE_DIR")
    )


def test_compose_gives_what_is_there(tmp_path: Path) -> None:
    service = COMPOSE["services"]["loraserve"]
    settings = settings_of(service["command"], image_environment(), tmp_path)
    targets = [port.split(":")[2] for port in service["ports"]]
    assert targets == [str(settings.http_port), str(settings.grpc_port)]
    assert service["build"]["target"] in re.findall(r"^FROM .* AS (.*)$", DOCKERFILE, re.MULTILINE)
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    assert float(service["stop_grace_period"].removesuffix("s")) > settings.drain_seconds
    for one in COMPOSE["services"].values():
        for volume in one["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), volume
            else:
                assert source in COMPOSE["volumes"] or source.startswith("/"), volume


def test_prometheus_asks_the_server_and_grafana_asks_prometheus() -> None:
    scraped = loaded(DEPLOY / "prometheus/prometheus.yml")["scrape_configs"][0]["static_configs"][0][
        "targets"
    ]
    assert scraped == ["loraserve:8000"]
    source = loaded(DEPLOY / "grafana/provisioning/datasources/prometheus.yml")["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    folder = loaded(DEPLOY / "grafana/provisioning/dashboards/loraserve.yml")["providers"][0]["options"][
        "path"
    ]
    mounted = [volume.split(":")[1] for volume in COMPOSE["services"]["grafana"]["volumes"]]
    assert f"{folder}/loraserve.json" in mounted


def test_kserve_tells_settings_that_there_are(tmp_path: Path) -> None:
    (container,) = KSERVE["spec"]["predictor"]["containers"]
    settings = settings_of(container["args"], image_environment(), tmp_path)
    assert [port["containerPort"] for port in container["ports"]] == [settings.http_port]
    check_probes(container, {settings.http_port})
    assert KSERVE["spec"]["predictor"]["terminationGracePeriodSeconds"] > settings.drain_seconds


def test_ray_tells_settings_that_there_are(tmp_path: Path) -> None:
    (application,) = yaml.safe_load(RAY["spec"]["serveConfigV2"])["applications"]
    settings = settings_of(["--config", CONFIG], {}, tmp_path, yaml.dump(application["args"]))
    assert settings.model == application["args"]["model"]
    assert application["import_path"] == "loraserve.ray:app"
    cluster = RAY["spec"]["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    assert (settings.replicas, settings.max_replicas) == (group["replicas"], group["maxReplicas"])
    (worker,) = group["template"]["spec"]["containers"]
    assert settings.replica_cores == int(worker["resources"]["requests"]["cpu"])
    assert settings.adapter_cache_dir.is_relative_to(worker["volumeMounts"][0]["mountPath"])


def test_systemd_tells_settings_that_there_are(tmp_path: Path) -> None:
    unit = (DEPLOY / "systemd/loraserve.service").read_text()
    (command,) = re.findall(r"^ExecStart=\S+ serve (.*)$", unit, re.MULTILINE)
    (variables,) = re.findall(r"^Environment=(.*)$", unit, re.MULTILINE)
    environ = dict(one.split("=", 1) for one in variables.split())
    settings = settings_of(command.split(), environ, tmp_path, "model: smollm2")
    assert str(settings.state_dir) == "/var/lib/loraserve"
    (stop_s,) = re.findall(r"^TimeoutStopSec=(.*)$", unit, re.MULTILINE)
    assert float(stop_s) > settings.drain_seconds
