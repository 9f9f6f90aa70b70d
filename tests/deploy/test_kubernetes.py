"""The manifests for Kubernetes: valid, with few rights, one writer of the store, and a backup that can be restored."""

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.client import Client, Upload
from tests.conftest import MODEL, ROOT, encoded, scene
from tests.ports import free_port
from tests.serving import LOOKALIKE, running, serving

FOLDER = ROOT / "deploy" / "kubernetes"
# Kinds of the Prometheus operator have no schema in Kubernetes' own.
FOREIGN = ["ServiceMonitor"]
KUSTOMIZATIONS = sorted(path.parent for path in FOLDER.rglob("kustomization.yaml"))

Resource = dict[str, Any]


def read(path: Path) -> list[Resource]:
    return list(yaml.safe_load_all(path.read_text()))


def build(folder: Path) -> list[Resource]:
    """Return what `kustomize build` makes of a folder that has resources and strategic merges, no more.

    Fails if a file is missing, a resource is there twice, or a patch has no target.
    """
    (kustomization,) = read(folder / "kustomization.yaml")
    assert set(kustomization) <= {"apiVersion", "kind", "resources", "patches"}
    found: dict[tuple[str, str], Resource] = {}
    for name in kustomization["resources"]:
        path = (folder / name).resolve()
        for one in build(path) if path.is_dir() else read(path):
            assert key(one) not in found, f"{key(one)} is there twice"
            found[key(one)] = one
    for entry in kustomization.get("patches", []):
        assert set(entry) == {"patch"}
        patch = yaml.safe_load(entry["patch"])
        assert key(patch) in found, f"{key(patch)} of {folder} is not there"
        found[key(patch)] = merged(found[key(patch)], patch)
    return list(found.values())


def key(resource: Resource) -> tuple[str, str]:
    return resource["kind"], resource["metadata"]["name"]


def merged(base: Any, patch: Any) -> Any:
    """Return a strategic merge: mappings by their keys, lists of named elements by their names, the rest replaced."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return base | {name: merged(base.get(name), value) for name, value in patch.items()}
    if isinstance(base, list) and all(isinstance(one, dict) and "name" in one for one in [*base, *patch]):
        changes = {one["name"]: one for one in patch}
        kept = [merged(one, changes.pop(one["name"], {})) for one in base]
        return kept + list(changes.values())
    return patch


def pods(resources: list[Resource]) -> Iterator[tuple[str, Resource, Resource]]:
    """Yield kind, metadata and spec of each pod that resources make."""
    for one in resources:
        spec = one.get("spec", {})
        template = spec.get("jobTemplate", {}).get("spec", spec).get("template")
        if template is not None:
            yield one["kind"], template["metadata"], template["spec"]


def test_each_kind_is_there() -> None:
    kinds = {one["kind"] for one in build(FOLDER / "base")}
    assert kinds == {
        *("Service", "StatefulSet", "Deployment", "HorizontalPodAutoscaler", "PodDisruptionBudget"),
        *("NetworkPolicy", "CronJob", "PersistentVolumeClaim"),
    }


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda path: path.name)
def test_every_overlay_is_valid(folder: Path, tmp_path: Path) -> None:
    ours = [one for one in build(folder) if one["kind"] not in FOREIGN]
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(ours))
    validate(tmp_path / "all.yaml", len(ours))


def test_every_file_is_valid() -> None:
    used = {
        (folder / name).resolve()
        for folder in KUSTOMIZATIONS
        for name in read(folder / "kustomization.yaml")[0]["resources"]
    }
    for path in FOLDER.rglob("*.yaml"):
        if path.name != "kustomization.yaml":
            assert path in used or path.name == "restore.yaml", f"{path} is in no kustomization"
            if not any(one["kind"] in FOREIGN for one in read(path)):
                validate(path, len(read(path)))


def validate(path: Path, count: int) -> None:
    program = Path(sys.executable).with_name("kubernetes-validate")
    done = subprocess.run([program, "--strict", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    # A kind that it does not know is a warning only.
    assert done.stdout.count(" passed for resource ") == count, done.stdout


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda path: path.name)
def test_the_pods_have_no_more_rights_than_they_need(folder: Path) -> None:
    found = list(pods([*build(folder), *read(FOLDER / "restore.yaml")]))
    assert len(found) == 4
    for kind, _, spec in found:
        assert spec["automountServiceAccountToken"] is False
        rights = spec["securityContext"]
        assert rights["runAsNonRoot"] is True
        assert rights["runAsUser"] == rights["runAsGroup"] == rights["fsGroup"] == 65532
        assert rights["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
        assert container["resources"]["requests"]["cpu"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts["tmp"] == "/tmp"
        claimed = {"data"} if kind == "StatefulSet" else set()
        assert set(mounts) == {volume["name"] for volume in spec["volumes"]} | claimed
        if kind in ("StatefulSet", "Deployment"):
            assert spec["terminationGracePeriodSeconds"] == 30
            # Keys come from a file, never from a variable.
            keys = {one["name"]: one.get("value") for one in container["env"]}
            assert Path(keys["LOOKALIKE_API_KEYS_FILE"]).parent == Path(mounts["keys"])
            ways = [
                container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")
            ]
            assert ways == ["/readyz", "/readyz", "/livez"]


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda path: path.name)
def test_selectors_find_what_they_are_for(folder: Path) -> None:
    resources = build(folder)
    labels = [meta["labels"] for _, meta, _ in pods(resources)]

    def found(selector: dict[str, str], among: list[dict[str, str]]) -> int:
        return sum(selector.items() <= one.items() for one in among)

    for one in resources:
        spec = one["spec"]
        if one["kind"] == "Service":
            assert found(spec["selector"], labels) == 1
        elif one["kind"] in ("StatefulSet", "Deployment", "PodDisruptionBudget"):
            assert found(spec["selector"]["matchLabels"], labels) == 1
        elif one["kind"] == "NetworkPolicy":
            # Nothing goes out of any of them.
            assert found(spec["podSelector"]["matchLabels"], labels) == len(labels) == 3
            assert spec["policyTypes"] == ["Ingress", "Egress"]
            assert spec["egress"] == []
        elif one["kind"] == "HorizontalPodAutoscaler":
            target = spec["scaleTargetRef"]
            (scaled,) = [other for other in resources if key(other) == (target["kind"], target["name"])]
            assert "replicas" not in scaled["spec"]
        elif one["kind"] == "ServiceMonitor":
            services = [other for other in resources if other["kind"] == "Service"]
            assert found(spec["selector"]["matchLabels"], [other["metadata"]["labels"] for other in services]) == 2
            assert all(other["metadata"]["name"].startswith("lookalike") for other in services)
            assert {port["name"] for other in services for port in other["spec"]["ports"]} == {
                spec["endpoints"][0]["port"]
            }
    assert ("ServiceMonitor" in {one["kind"] for one in resources}) == (folder.name == "monitoring")


def test_overlays_change_what_they_say() -> None:
    def container(overlay: str, kind: str) -> Resource:
        (spec,) = [spec for name, _, spec in pods(build(FOLDER / "overlays" / overlay)) if name == kind]
        one: Resource = spec["containers"][0]
        return one

    for kind in ("StatefulSet", "Deployment"):
        names = [one["name"] for one in container("monitoring", kind)["env"]]
        assert names == ["LOOKALIKE_API_KEYS_FILE", "LOOKALIKE_METRICS_PUBLIC"]
    assert container("gpu", "Deployment")["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container("gpu", "StatefulSet")["image"] == "lookalike"


def test_the_store_has_one_owner() -> None:
    resources = build(FOLDER / "base")
    (owner,) = [one for one in resources if one["kind"] == "StatefulSet"]
    assert owner["spec"]["replicas"] == 1
    # With one replica this ends the old pod before it starts the new one.
    assert owner["spec"]["updateStrategy"] == {"type": "RollingUpdate"}
    for kind, _, spec in pods([*resources, *read(FOLDER / "restore.yaml")]):
        claims = [one.get("persistentVolumeClaim", {}).get("claimName") for one in spec["volumes"]]
        if "data-lookalike-0" in claims:
            # Others of the volume do one thing, and end; the backup finds the node that has the volume.
            assert kind in ("CronJob", "Job")
            if kind == "CronJob":
                (near,) = spec["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
                assert near["labelSelector"]["matchLabels"] == owner["spec"]["selector"]["matchLabels"]
                assert near["topologyKey"] == "kubernetes.io/hostname"
    assert owner["spec"]["volumeClaimTemplates"][0]["metadata"]["name"] == "data"


@pytest.mark.slow("starts a service, and a second one")
def test_a_second_owner_is_refused(tmp_path: Path) -> None:
    """If a rolling update ever had two pods at once, the lock would stop the second one before it wrote anything."""
    store = ["--model", str(MODEL), "--store", str(tmp_path / "store")]
    with running(tmp_path, *store) as (_, address, _), Client(address) as client:
        list(client.add([Upload("a", encoded(scene()))]))
        second = subprocess.run(
            [LOOKALIKE, "serve", *store, "--port", str(free_port())], capture_output=True, text=True, timeout=60
        )
        assert second.returncode == 2
        (sentence,) = second.stderr.splitlines()
        assert f"{tmp_path}/store: in use by process" in sentence
        assert client.count() == 1
        list(client.add([Upload("b", encoded(scene()))]))
        assert client.count() == 2


def run(path: Path, volumes: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the container of the job in a file, with /data and /backups in a folder of this machine."""
    ((_, _, spec),) = pods([one for one in read(path) if one["kind"] != "PersistentVolumeClaim"])
    (container,) = spec["containers"]
    command = [*container["command"], *container["args"]]
    for volume in ("/data", "/backups"):
        command = [part.replace(f"{volume}/", f"{volumes}{volume}/") for part in command]
    variables = os.environ | {"PATH": f"{LOOKALIKE.parent}:{os.environ['PATH']}"} | environment
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)


@pytest.mark.slow("starts two services, and the commands of both jobs")
def test_a_backup_of_the_cron_job_is_restored_and_served(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "backups").mkdir()
    with serving(tmp_path / "data") as address, Client(address) as client:
        list(client.add([Upload("a", encoded(scene())), Upload("b", encoded(scene(seed=1)))]))
        done = run(FOLDER / "base" / "backup.yaml", tmp_path)
        assert done.returncode == 0, done.stderr
        (backup,) = (tmp_path / "backups").iterdir()
        assert backup.name in [f"{day}.backup" for day in range(1, 8)]
        # What was added later is not in it.
        list(client.add([Upload("c", encoded(scene()))]))
        refused = run(FOLDER / "restore.yaml", tmp_path, BACKUP=str(backup))
        assert refused.returncode == 2
        assert refused.stderr.strip().endswith("is in use: scale the StatefulSet lookalike to 0 first")
        assert client.count() == 3
    damaged = tmp_path / "backups" / "damaged"
    damaged.write_bytes(backup.read_bytes()[:5000])
    assert run(FOLDER / "restore.yaml", tmp_path, BACKUP=str(damaged)).returncode == 2
    assert [path.name for path in (tmp_path / "data").iterdir() if path.is_dir()] == ["store"]
    done = run(FOLDER / "restore.yaml", tmp_path, BACKUP=str(backup))
    assert done.returncode == 0, done.stderr
    with serving(tmp_path / "data") as address, Client(address) as client:
        assert client.count() == 2
        assert client.content("b") == encoded(scene(seed=1))
        assert urllib.request.urlopen(f"{address}/readyz").status == 200
    # The store that was there before is kept.
    assert len(list((tmp_path / "data").glob("store-before-*/catalog.sqlite"))) == 1


def test_the_alerts_become_a_rule_of_the_operator() -> None:
    """The command that docs/operations.md gives makes a PrometheusRule with the groups of deploy/alerts.yaml."""
    text = (ROOT / "docs" / "operations.md").read_text()
    command = text[text.index("{ printf ") : text.index(" | kubectl apply -f -", text.index("{ printf "))]
    done = subprocess.run(["sh", "-ec", command], cwd=ROOT, capture_output=True, text=True, check=True)
    rule = yaml.safe_load(done.stdout)
    assert (rule["kind"], rule["metadata"]["name"]) == ("PrometheusRule", "lookalike")
    assert rule["spec"] == yaml.safe_load((ROOT / "deploy" / "alerts.yaml").read_text())
