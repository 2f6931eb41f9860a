"""docker-compose.yml, the manifests of Kubernetes and the configuration of Prometheus name what there is.
`.ci/manifests` checks the former against their schemas, and `make cluster-demo` runs the services of Compose as
processes."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from exposed import SERIES

from batchserve.cli import app
from batchserve.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
BUILT = {name: service for name, service in SERVICES.items() if "build" in service}
OURS = {name: service for name, service in BUILT.items() if "entrypoint" not in service}
MANIFESTS = [
    document
    for file in sorted((DEPLOY / "kubernetes").rglob("*.yaml"))
    for document in yaml.safe_load_all(file.read_text())
]
KNOWN = {f"BATCHSERVE_{name.upper()}" for name in Settings.model_fields} | {
    f"AWS_{name}" for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "REGION", "ENDPOINT_URL")
}


def parse(arguments: list[str]) -> None:
    """Raises what the command line raises for wrong arguments; runs nothing."""
    group: Any = typer.main.get_command(app)
    name, *rest = arguments
    with group.make_context("batchserve", [name], resilient_parsing=True) as context:
        command = group.get_command(context, name)
        assert command is not None, name
        command.make_context(name, rest, parent=context).close()


def require_known(names: set[str]) -> None:
    assert {name.removesuffix("_FILE") for name in names} <= KNOWN


def containers() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The pods of the manifests, each with its only container."""
    for document in MANIFESTS:
        if document["kind"] in ("Deployment", "Job"):
            pod = document["spec"]["template"]["spec"]
            (container,) = pod["containers"]
            yield pod, container


@pytest.mark.parametrize("name", OURS)
def test_the_services_run_commands_that_there_are(name: str) -> None:
    parse(SERVICES[name]["command"])


@pytest.mark.parametrize("name", BUILT)
def test_the_services_have_settings_that_there_are(name: str) -> None:
    require_known({name for name in SERVICES[name].get("environment", {}) if not name.startswith("RAY_AUTH_")})


def test_the_services_of_others_are_of_a_fixed_version() -> None:
    for name, service in SERVICES.items():
        assert name in BUILT or re.search(r":v?\d", service["image"]), name


def test_all_that_a_service_names_is_defined() -> None:
    for service in SERVICES.values():
        assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"])
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert source in COMPOSE["volumes"] or (ROOT / source).exists(), volume
        after = service.get("depends_on", [])
        assert set(after) <= set(SERVICES)
        for other, how in after.items() if isinstance(after, dict) else ():
            assert how["condition"] != "service_healthy" or "healthcheck" in SERVICES[other], other


def test_the_embedded_service_starts_alone_unless_the_profile_is_asked_for() -> None:
    assert [name for name, service in SERVICES.items() if "profiles" not in service] == ["batchserve"]


def test_the_secrets_are_made_once_and_are_random(tmp_path: Path) -> None:
    script = tmp_path / "secrets.sh"
    script.write_bytes((DEPLOY / "secrets.sh").read_bytes())

    def made() -> dict[str, str]:
        subprocess.run(["sh", script], check=True)
        return {file.name: file.read_text() for file in (tmp_path / "secrets").iterdir()}

    secrets = made()
    assert set(secrets) == set(COMPOSE["secrets"])
    assert made() == secrets
    assert (tmp_path / "secrets").stat().st_mode & 0o77 == 0
    (identity,) = json.loads(secrets["s3_identities"])["identities"]
    assert identity["credentials"] == [{"accessKey": secrets["s3_access_key"], "secretKey": secrets["s3_secret_key"]}]
    assert secrets["postgres_password"] in secrets["database"]
    assert len({secrets[name] for name in ("postgres_password", "s3_access_key", "s3_secret_key")}) == 3


def test_the_pods_run_commands_and_settings_that_there_are() -> None:
    (settings,) = (document["data"] for document in MANIFESTS if document["kind"] == "ConfigMap")
    require_known(set(settings))
    for pod, container in containers():
        if "command" not in container:
            parse(container["args"])
        require_known({entry["name"] for entry in container.get("env", ()) if entry["name"][:4] != "RAY_"})
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        for name, value in settings.items():
            assert not name.endswith("_FILE") or str(Path(value).parent) in mounted


def test_the_selectors_of_the_manifests_match_their_pods() -> None:
    labels = [d["spec"]["template"]["metadata"]["labels"] for d in MANIFESTS if d["kind"] in ("Deployment", "Job")]
    for document in MANIFESTS:
        selector = document.get("spec", {}).get("selector", {})
        wanted = selector.get("matchLabels", selector)
        assert not wanted or any(wanted.items() <= there.items() for there in labels), document["metadata"]
    (scaler,) = (d["spec"]["scaleTargetRef"] for d in MANIFESTS if d["kind"] == "HorizontalPodAutoscaler")
    assert (scaler["kind"], scaler["name"]) in {(d["kind"], d.get("metadata", {}).get("name")) for d in MANIFESTS}


@pytest.mark.parametrize("folder", [DEPLOY / "kubernetes", DEPLOY / "kubernetes" / "ray"], ids=["cluster", "ray"])
def test_the_kustomizations_have_every_manifest(folder: Path) -> None:
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    assert {*listed, "kustomization.yaml"} == {file.name for file in folder.glob("*.yaml")}


def test_the_scaler_reads_a_metric_that_there_is() -> None:
    (scaler,) = (d["spec"]["metrics"] for d in MANIFESTS if d["kind"] == "HorizontalPodAutoscaler")
    for metric in scaler:
        asked = metric["external"]["metric"]
        assert set(asked["selector"]["matchLabels"]) <= set(SERIES[asked["name"]].labels)


def test_prometheus_scrapes_ports_that_the_services_listen_on() -> None:
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    (api,), (workers,) = (config.get("static_configs") or config["dns_sd_configs"] for config in scraped)
    assert api["targets"] == [f"api:{SERVICES['api']['command'][-2]}"]
    address = SERVICES["worker"]["environment"]["BATCHSERVE_METRICS_ADDRESS"]
    assert (workers["names"], f"0.0.0.0:{workers['port']}") == (["worker"], address)


# --- systemd ---------------------------------------------------------------------------------------------------------

UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


def settings_in(unit: str, name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", unit, re.MULTILINE)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_units_run_commands_and_set_variables_that_there_are(unit: Path) -> None:
    text = unit.read_text()
    (command,) = settings_in(text, "ExecStart")
    program, *arguments = command.split()
    assert program == "/opt/batchserve/bin/batchserve"
    parse(arguments)
    variables = {pair.partition("=")[0] for line in settings_in(text, "(?:# )?Environment") for pair in line.split()}
    require_known(variables - {"BATCHSERVE_URL", "BATCHSERVE_API_KEY_FILE"})


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_units_are_confined(unit: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done.stderr
    assert float(found[1]) < 3
    assert f" {found[1]}" in (ROOT / "docs" / "recipes.md").read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_the_units_are_well_formed(tmp_path: Path) -> None:
    """With the program of this environment, because systemd looks for it."""
    program = Path(sys.executable).with_name("batchserve")
    for unit in (DEPLOY / "systemd").iterdir():
        (tmp_path / unit.name).write_text(unit.read_text().replace("/opt/batchserve/bin/batchserve", str(program)))
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *map(str, sorted(tmp_path.iterdir()))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if "batchserve" in line] == []
