"""compose.yaml as docker-compose reads it: every way to run it has one writer of the store, and hardened containers."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, missing

FILE = ROOT / "compose.yaml"
COMPOSE = yaml.safe_load(FILE.read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
# The commands that its first lines name.
COMMANDS = re.findall(r"^#   docker compose (.*?)  ", FILE.read_text(), re.M)


def docker_compose(*arguments: str | Path) -> str:
    """Run docker-compose's check and return what it printed. Fails with that if it is not content."""
    for program in (["docker-compose"], ["docker", "compose"]):
        if shutil.which(program[0]) is not None:
            done = subprocess.run([*program, *arguments], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout
    missing("no docker-compose: install Debian's package docker-compose")


def started(command: str) -> set[str]:
    """Return the services that a `docker compose … up …` starts, those that others depend on included."""
    options, _, names = command.partition("up")
    profiles = {name for name in shlex.split(options) if name != "--profile"}
    wanted = shlex.split(names) or [name for name, one in SERVICES.items() if not one.get("profiles")]
    found: set[str] = set()
    while wanted:
        name = wanted.pop()
        assert set(SERVICES[name].get("profiles", [])) <= profiles, f"{name} is of another profile"
        found.add(name)
        wanted += [other for other in SERVICES[name].get("depends_on", {}) if other not in found]
    return found


@pytest.mark.parametrize("profile", [[], ["--profile", "gpu"], ["--profile", "scale"]], ids=" ".join)
def test_docker_compose_reads_each_profile(profile: list[str]) -> None:
    docker_compose(*profile, "config", "--quiet")


def test_each_way_has_one_service_of_the_store() -> None:
    assert len(COMMANDS) == 3
    ways = [started(command) for command in COMMANDS]
    assert set.union(*ways) == set(SERVICES)
    for way in ways:
        assert sum("store:/data" in SERVICES[name].get("volumes", []) for name in way) <= 1
        ports = [port.split(":")[1] for name in way for port in SERVICES[name].get("ports", [])]
        assert len(set(ports)) == len(ports)
        assert {"3000", "3001", "9090"} == set(ports)
        # Prometheus finds all that answer to this name.
        answering = {name for name in way if name.startswith(("lookalike", "replica"))}
        assert all(
            name == "lookalike" or "lookalike" in SERVICES[name]["networks"]["default"]["aliases"] for name in answering
        )
        assert len(answering) == (2 if "nginx" in way else 1)


def test_the_containers_have_no_more_rights_than_they_need() -> None:
    for name, one in SERVICES.items():
        assert one["restart"] == "unless-stopped"
        # Nothing is open to other machines.
        assert all(port.startswith("127.0.0.1:") for port in one.get("ports", []))
        if name not in ("milvus", "etcd", "minio"):
            assert one["read_only"] is True
            assert "/tmp" in one["tmpfs"]
            assert one["cap_drop"] == ["ALL"]
            assert one["security_opt"] == ["no-new-privileges:true"]
        else:
            assert one["networks"] == ["milvus"]
        if name.startswith(("lookalike", "replica")):
            assert one["stop_grace_period"] == "30s"
            # The health check is the image's own.
            assert "healthcheck" not in one
        else:
            assert re.search(r":v?\w+\.[\w.-]+$", one["image"]), "a version is expected"
    assert COMPOSE["networks"]["milvus"] == {"internal": True}


def test_files_that_are_mounted_exist() -> None:
    mounted = [volume for one in SERVICES.values() for volume in one.get("volumes", [])]
    files = [volume.split(":")[0] for volume in mounted if volume.startswith("./")]
    assert len(files) == 6
    assert all((ROOT / file).is_file() for file in files)
    assert {volume.split(":")[0] for volume in mounted if not volume.startswith("./")} == set(COMPOSE["volumes"])


def test_grafana_finds_dashboard_and_prometheus() -> None:
    volumes = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    (source,) = yaml.safe_load((ROOT / "deploy/grafana/datasources.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((ROOT / "deploy/grafana/dashboards.yaml").read_text())["providers"]
    assert Path(volumes["./deploy/grafana.json"]).parent == Path(provider["options"]["path"])
    for kind in ("datasources", "dashboards"):
        folder = Path(volumes[f"./deploy/grafana/{kind}.yaml"]).parent
        assert folder == Path("/etc/grafana/provisioning") / kind


def test_nginx_has_both_replicas(tmp_path: Path) -> None:
    """The command of the container changes deploy/nginx.conf into a file that nginx accepts."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        missing("no nginx: install Debian's package nginx")
    command = SERVICES["nginx"]["command"][0].replace("exec nginx", "exit; nginx")
    command = command.replace("/etc/nginx/conf.d", str(tmp_path)).replace(" /lookalike.conf", " deploy/nginx.conf")
    subprocess.run([*SERVICES["nginx"]["entrypoint"], command], cwd=ROOT, check=True)
    written = (tmp_path / "lookalike.conf").read_text()
    assert "listen 8080;" in written
    assert SERVICES["nginx"]["ports"] == ["127.0.0.1:3000:8080"]
    for number in (1, 2):
        assert written.count(f"server replica-{number}:3000 resolve ") == 1
        assert f"replica-{number}" in SERVICES
        # Debian's nginx is older than `resolve`, and these names have no address here.
        written = written.replace(f"replica-{number}:3000 resolve", f"127.0.0.1:300{number}")
    (tmp_path / "lookalike.conf").write_text(written)
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid; error_log stderr; events {{}} http {{ access_log off; include {tmp_path}/*r.conf; "
        f"include {tmp_path}/lookalike.conf; }}"
    )
    done = subprocess.run([program, "-t", "-c", tmp_path / "nginx.conf"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_example_with_keys_is_accepted(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "operations.md").read_text().partition("\n## Containers with compose\n")[2]
    (tmp_path / "override.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
    together = yaml.safe_load(docker_compose("-f", FILE, "-f", tmp_path / "override.yaml", "config"))
    environment = together["services"]["lookalike"]["environment"]
    assert environment == {"LOOKALIKE_METRICS_PUBLIC": "true", "LOOKALIKE_API_KEYS_FILE": "/run/secrets/keys"}
    assert together["services"]["lookalike"]["secrets"] == [{"source": "keys"}]


def test_the_images_are_built_from_arguments_and_locks_that_exist() -> None:
    declared = set(re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.M))
    for name, service in SERVICES.items():
        if "build" in service:
            told = service["build"]["args"]
            assert set(told) <= declared, name
            lock = "-".join(["image", told["ACCELERATOR"], *([told["EXTRAS"]] if "EXTRAS" in told else [])])
            assert (ROOT / "requirements" / f"{lock}.txt").is_file(), name
