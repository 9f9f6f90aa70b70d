"""The image, as an operator runs it: hardened, limited, interrupted, with broken volumes and without a network."""

import hashlib
import json
import os
import subprocess
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service import __version__
from tests.conftest import ROOT, encoded
from tests.deploy.containers import (
    COMMIT,
    IMAGE,
    Container,
    ask,
    build,
    container,
    find_tool,
    readable,
    run_once,
    volume,
)

pytestmark = [pytest.mark.proof, pytest.mark.timeout(900)]

_USER = 65532
_LIMIT_MB = 550
_MODULES = """
import importlib, pkgutil, service
extras = {"grpc", "pymilvus", "ray", "sklearn", "milvus_lite"}
for module in pkgutil.walk_packages(service.__path__, "service."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        assert error.name.partition(".")[0] in extras, (module.name, error)
import lookalike
print("all imported")
"""


def noise(side: int, block: int = 50) -> Image.Image:
    """Return a square picture of blocks of random colours."""
    small = np.random.default_rng(0).integers(0, 256, (side // block, side // block, 3), dtype=np.uint8)
    return Image.fromarray(small.repeat(block, 0).repeat(block, 1))


PICTURE = encoded(noise(200))


@pytest.fixture(scope="module")
def tool() -> str:
    """Build the image, and return the tool that runs it."""
    found = find_tool()
    build(found)
    return found


@pytest.fixture(scope="module")
def served(tool: str) -> Iterator[Container]:
    """One container that the tests share which only look at it."""
    with container(tool) as one:
        yield one


def inside(tool: str, *command: str) -> str:
    """Run a command of the image in place of its entry point, and return what it printed."""
    run = [tool, "run", "--rm", "--read-only", "--tmpfs", "/tmp", "--entrypoint", command[0], IMAGE, *command[1:]]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_small_and_labelled(tool: str) -> None:
    def size(image: str) -> int:
        return int(
            subprocess.run([tool, "image", "inspect", "-f", "{{.Size}}", image], capture_output=True, check=True).stdout
        )

    over = (size(IMAGE) - size("docker.io/library/python:3.11-slim")) / 1e6
    print(f"\nthe image: {over:.0f} MB over its base")
    assert over <= _LIMIT_MB
    facts = json.loads(subprocess.run([tool, "image", "inspect", IMAGE], capture_output=True, check=True).stdout)[0]
    labels = facts["Config"]["Labels"]
    for name in ("title", "description", "licenses"):
        assert labels[f"org.opencontainers.image.{name}"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.revision"] == COMMIT
    assert run_once(tool, "--", "--version") == (0, f"lookalike {__version__} (commit {COMMIT})")
    assert facts["Config"]["User"] == f"{_USER}:{_USER}"
    assert list(facts["Config"]["Volumes"]) == ["/data"]
    assert list(facts["Config"]["ExposedPorts"]) == ["3000/tcp"]


def test_it_has_what_serving_needs_and_no_more(tool: str) -> None:
    assert inside(tool, "python", "-c", _MODULES).strip() == "all imported"
    absent = inside(
        tool,
        "python",
        "-c",
        "from importlib.util import find_spec; from shutil import which; "
        "print([name for name in ('torch', 'pip', 'ensurepip', 'setuptools', 'sklearn', 'scipy') if find_spec(name)], "
        "[name for name in ('pip', 'uv', 'gcc', 'cc', 'make', 'strip') if which(name)])",
    )
    assert absent.strip() == "[] []"
    sbom = json.loads(inside(tool, "cat", "/app/sbom.cdx.json"))
    assert sbom["bomFormat"] == "CycloneDX"
    versions = {one["name"].lower(): one["version"] for one in sbom["components"]}
    lock = (ROOT / "requirements" / "image-cpu.txt").read_text()
    locked = dict(line.split(" ")[0].split("==") for line in lock.splitlines() if "==" in line)
    assert {name.replace("_", "-"): version for name, version in versions.items()} == locked


def test_every_verb_runs(tool: str) -> None:
    verbs = inside(
        tool, "python", "-c", "import lookalike, typer; print(*typer.main.get_command(lookalike.cli).commands)"
    )
    assert {"serve", "index", "embed", "store", "doctor"} <= set(verbs.split())
    for verb in verbs.split():
        code, output = run_once(tool, "--", verb, "--help")
        assert (code, "Usage" in output) == (0, True), output
    # What the image lacks is named, in one sentence.
    code, output = run_once(tool, "--", "index", "digits", "--store", "/tmp/store")
    assert (code, output.count("\n"), "extra demo" in output) == (2, 0, True), output
    code, output = run_once(tool, "--", "pretrain", "/tmp", "--recipe", "mnist-simclr", "--out", "/tmp/x")
    assert (code, "training environment" in output) == (2, True), output


def test_it_serves_without_rights(served: Container) -> None:
    print(f"\nready {served.ready_s:.1f} s after run")
    assert ask(f"{served.url}/images/x", PICTURE, "PUT")[0] == 201
    hits = json.loads(ask(f"{served.url}/search?k=1", PICTURE)[1])["hits"]
    assert hits[0]["id"] == "x"
    info = json.loads(ask(f"{served.url}/info")[1])
    assert (info["model"], info["versions"]["lookalike"], info["commit"]) == ("photos", __version__, COMMIT)
    assert served.execute("id", "-u").strip() == str(_USER)
    for pid in served.processes():
        status = dict(
            line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
        )
        assert set(status["Uid"].split()) == {str(_USER)}
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
        assert status["NoNewPrivs"] == "1"
    for place in ("/app/x", "/opt/lookalike/x", "/etc/x", "/x"):
        with pytest.raises(AssertionError, match=r"(?i)read-only|permission|denied"):
            served.execute("touch", place)


def test_memory_of_a_service_that_waits(served: Container) -> None:
    sizes = {}
    for pid, command in served.processes().items():
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        sizes[command] = sum(int(line.split()[1]) for line in lines if line.startswith("Rss:")) / 1000
    print(f"\nmemory: {sum(sizes.values()):.0f} MB RSS in {len(sizes)} processes")
    assert sum(sizes.values()) <= 350


def test_orphans_are_reaped(served: Container) -> None:
    served.execute("python", "-c", "import subprocess; subprocess.Popen(['sh', '-c', 'sleep 0.2 & exit']).wait()")
    time.sleep(1)
    states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in served.processes()]
    assert "Z" not in states


def test_the_health_check_notices_a_service_that_hangs(tool: str) -> None:
    with container(tool) as one:
        assert one.is_healthy()
        os.kill(one.worker(), 19)  # SIGSTOP
        assert not one.is_healthy()
        os.kill(one.worker(), 18)
        one.wait_until_ready()
        assert one.is_healthy()
        assert one.stop() == 0


def test_sigterm_answers_what_was_accepted_and_exits_with_0(tool: str) -> None:
    with container(tool) as one, ThreadPoolExecutor(8) as pool:
        large = encoded(noise(4000))
        answers = [pool.submit(ask, f"{one.url}/embed", large) for _ in range(8)]
        while b"lookalike_requests_at_work 8.0" not in ask(f"{one.url}/metrics")[1]:
            assert not all(answer.done() for answer in answers), "too quick to be interrupted"
        begin = time.monotonic()
        assert one.stop(30) == 0
        print(f"\nstopped after {time.monotonic() - begin:.1f} s")
        assert [answer.result()[0] for answer in answers] == [200] * 8


def test_data_outlive_the_container_and_have_one_writer(tool: str) -> None:
    with volume(tool) as data:
        with container(tool, "-v", f"{data}:/data") as one:
            assert ask(f"{one.url}/images/x", PICTURE, "PUT")[0] == 201
            code, output = run_once(tool, "-v", f"{data}:/data", "-e", "LOOKALIKE_PORT=1", "--", "serve")
            assert (code, "in use by process" in output) == (2, True), output
            assert one.stop() == 0
        with container(tool, "-v", f"{data}:/data") as another:
            assert json.loads(ask(f"{another.url}/search?k=1", PICTURE)[1])["hits"][0]["id"] == "x"


def test_a_folder_is_indexed_into_the_volume(tool: str, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(PICTURE)
    pictures = readable(tmp_path / "pictures")
    tmp_path.chmod(0o755)
    with volume(tool) as data:
        index = ("index", "/pictures", "--store", "/data/store")
        code, output = run_once(tool, "-v", f"{data}:/data", "-v", f"{pictures}:/pictures:ro", "--", *index)
        assert (code, "1 pictures added" in output) == (0, True), output
        with container(tool, "-v", f"{data}:/data") as one:
            assert json.loads(ask(f"{one.url}/info")[1])["count"] == 1


def test_a_volume_of_another_owner_gives_the_command_that_mends_it(tool: str) -> None:
    with volume(tool) as data:
        mend = [tool, "run", "--rm", "--user", "0", "--entrypoint", "chown", "-v", f"{data}:/data", IMAGE, "-R"]
        subprocess.run([*mend, "0:0", "/data"], check=True, capture_output=True)
        code, output = run_once(tool, "-v", f"{data}:/data", "--", "serve")
        assert code == 2
        assert f"chown -v VOLUME:/data IMAGE -R {_USER}:{_USER} /data" in output
        subprocess.run([*mend, f"{_USER}:{_USER}", "/data"], check=True, capture_output=True)
        with container(tool, "-v", f"{data}:/data"):
            pass


def test_a_corrupt_store_is_named_and_left_alone(tool: str, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    damaged = tmp_path / "store" / "catalog.sqlite"
    damaged.write_bytes(os.urandom(5000))
    for path in (tmp_path, tmp_path / "store", damaged):
        os.chown(path, _USER, _USER)
    before = damaged.read_bytes()
    code, output = run_once(tool, "-v", f"{tmp_path}:/data", "--", "serve")
    assert (code, "/data/store/catalog.sqlite: damaged" in output) == (2, True), output
    assert damaged.read_bytes() == before


def test_keys_come_from_a_secret_file(tool: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("read:0123456789abcdef\n")
    keys.chmod(0o444)
    secret = ("-v", f"{keys}:/run/secrets/keys:ro", "-e", "LOOKALIKE_API_KEYS_FILE=/run/secrets/keys")
    with container(tool, *secret) as one:
        assert ask(f"{one.url}/info")[0] == 401
        assert ask(f"{one.url}/info", Authorization="Bearer 0123456789abcdef")[0] == 200
        assert "0123456789abcdef" not in one.log() + one.call("inspect", one.name)


def test_memory_stays_below_its_limit_under_large_pictures(tool: str, tmp_path: Path) -> None:
    pictures = []
    for form in ("png", "jpeg", "webp"):
        noise(5000).save(tmp_path / "large", form)
        pictures.append((tmp_path / "large").read_bytes())
    assert all(len(picture) <= 10_000_000 for picture in pictures)
    with container(tool, "--memory", "1g", "--memory-swap", "1g") as one:
        end = time.monotonic() + 30

        def client(number: int) -> list[int]:
            found: list[int] = []
            while time.monotonic() < end:
                found.append(ask(f"{one.url}/embed", pictures[len(found) % 3])[0])
            return found

        with ThreadPoolExecutor(16) as pool:
            statuses = Counter(status for found in pool.map(client, range(16)) for status in found)
        print(f"\nanswers to 16 clients with 25 MP in 1 GB: {dict(statuses)}")
        assert set(statuses) <= {200, 429, 503}
        assert statuses[200] >= 10
        state = one.state()
        assert (state["Running"], state["OOMKilled"]) == (True, False)
        # The service is the same one as before, so none of its processes was killed.
        assert one.log().count("serving 0 pictures") == 1
        assert one.stop() == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB that belongs to the user of the image."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size=64m,uid={_USER},gid={_USER}", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("THE IMAGE WAS NOT TESTED ON A FULL DISK: no tmpfs can be mounted here")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_full_disk_refuses_writes_loses_nothing_and_recovers(tool: str, small_disk: Path) -> None:
    large, added = encoded(noise(1000, 1)), 0
    with container(tool, "-v", f"{small_disk}:/data") as one:
        # Something else takes half of the disk.
        one.execute("dd", "if=/dev/zero", "of=/data/other", "bs=1M", "count=32")
        while (answer := ask(f"{one.url}/images/{added}", large, "PUT"))[0] == 201:
            added += 1
            assert added < 30
        print(f"\n{added} pictures of {len(large) / 1e6:.1f} MB fill 64 MB; then {answer[0]} {answer[1][:160]!r}")
        assert answer[0] == 503
        assert ask(f"{one.url}/search?k=1", large)[0] == ask(f"{one.url}/readyz")[0] == 200
        one.execute("rm", "/data/other")
        end = time.monotonic() + 60
        while ask(f"{one.url}/images/later", large, "PUT")[0] != 201:
            assert time.monotonic() < end, one.log()
            time.sleep(1)
        assert json.loads(ask(f"{one.url}/info")[1])["count"] == added + 1
        for item in (*range(added), "later"):
            assert ask(f"{one.url}/images/{item}")[0] == 200
        assert one.stop() == 0


def test_a_backup_is_restored_into_a_fresh_volume(tool: str) -> None:
    with volume(tool) as data, volume(tool) as backups, volume(tool) as fresh:
        both = ("-v", f"{data}:/data", "-v", f"{backups}:/backups")
        mend = [tool, "run", "--rm", "--user", "0", "--entrypoint", "chown", "-v", f"{backups}:/backups", IMAGE]
        subprocess.run([*mend, f"{_USER}:{_USER}", "/backups"], check=True, capture_output=True)
        with container(tool, *both) as one:
            assert ask(f"{one.url}/images/x", PICTURE, "PUT")[0] == 201
            one.execute("lookalike", "store", "backup", "--out", "/backups/today", "--store", "/data/store")
            assert ask(f"{one.url}/images/later", PICTURE, "PUT")[0] == 201
        restore = ("store", "restore", "/backups/today", "--store", "/data/store")
        code, output = run_once(tool, "-v", f"{fresh}:/data", "-v", f"{backups}:/backups", "--", *restore)
        assert code == 0, output
        with container(tool, "-v", f"{fresh}:/data") as restored:
            assert json.loads(ask(f"{restored.url}/info")[1])["count"] == 1
            assert json.loads(ask(f"{restored.url}/search?k=1", PICTURE)[1])["hits"][0]["id"] == "x"


@pytest.fixture
def watched() -> Iterator[tuple[str, str]]:
    """A network namespace whose only way out is a device that counts packets and drops them: its path and name."""
    name = f"lookalike-{os.getpid()}"
    if os.getuid() or subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        pytest.skip("THE IMAGE'S PACKETS WERE NOT COUNTED: no network namespace can be made here")
    try:
        for command in (
            "sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1",
            "ip link set lo up",
            "ip link add out type veth peer name nobody",
            "ip link set nobody up",
            "ip addr add 192.0.2.2/24 dev out",
            "ip link set out up",
            "ip route add default via 192.0.2.1",
            "ip neigh add 192.0.2.1 lladdr 02:00:00:00:00:01 dev out",
        ):
            subprocess.run(["ip", "netns", "exec", name, *command.split()], check=True, capture_output=True)
        yield f"/run/netns/{name}", name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)


def test_no_packet_leaves_it(tool: str, watched: tuple[str, str], tmp_path: Path) -> None:
    if tool != "podman":
        pytest.skip("THE IMAGE'S PACKETS WERE NOT COUNTED: docker cannot run a container in a given namespace")
    path, name = watched

    def sent() -> int:
        counter = ["ip", "netns", "exec", name, "cat", "/sys/class/net/out/statistics/tx_packets"]
        return int(subprocess.run(counter, capture_output=True, check=True).stdout)

    probe = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'x', ('198.51.100.1', 53))"
    subprocess.run(["ip", "netns", "exec", name, "python3", "-c", probe], check=True)
    before = sent()
    assert before == 1, "a packet that leaves is not counted"
    (tmp_path / "x.png").write_bytes(PICTURE)
    tmp_path.chmod(0o755)
    options = ("--network", f"ns:{path}", "--dns", "198.51.100.53", "-v", f"{readable(tmp_path)}:/pictures:ro")
    with container(tool, *options, ready=False) as one:
        port = one.url.rpartition(":")[2]
        call = (
            "import sys, urllib.request as u; body = open(sys.argv[2], 'rb').read() if sys.argv[2:] else None; "
            "print(u.urlopen(u.Request(sys.argv[1], body)).status)"
        )
        for _ in range(120):
            if one.execute("python", "-c", call, f"http://127.0.0.1:{port}/readyz", check=False).strip() == "200":
                break
            time.sleep(0.5)
        assert one.execute("python", "-c", call, f"http://127.0.0.1:{port}/embed", "/pictures/x.png").strip() == "200"
        assert one.execute("python", "-c", call, f"http://127.0.0.1:{port}/").strip() == "200"
        one.execute("lookalike", "embed", "/pictures", "--out", "/tmp/out")
        time.sleep(5)
        assert one.stop() == 0
    assert sent() == before


def test_two_builds_have_the_same_files(tool: str) -> None:
    if os.environ.get("LOOKALIKE_TWO_BUILDS") != "1":
        pytest.skip("two builds were not compared: LOOKALIKE_TWO_BUILDS=1 takes five minutes more")
    again = f"{IMAGE}-again"
    build(tool, again, "--no-cache")
    assert files(tool, again) == files(tool, IMAGE)


def files(tool: str, image: str) -> dict[str, str]:
    """Return the SHA-256 of every file of an image, by path."""
    made = subprocess.run([tool, "create", image], capture_output=True, check=True, text=True).stdout.strip()
    try:
        with subprocess.Popen([tool, "export", made], stdout=subprocess.PIPE) as export:
            assert export.stdout is not None
            with tarfile.open(fileobj=export.stdout, mode="r|") as archive:
                found = {}
                for member in archive:
                    content = archive.extractfile(member) if member.isfile() else None
                    digest = hashlib.sha256(content.read()).hexdigest() if content else member.linkname
                    found[member.name] = f"{member.mode:o} {digest}"
                return found
    finally:
        subprocess.run([tool, "rm", made], capture_output=True, check=True)
