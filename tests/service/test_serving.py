"""What `lookalike serve` settles before BentoML starts: the address, and a folder that BentoML can write."""

import os
import socket
from pathlib import Path

import pytest

from service.errors import InvalidRequest
from service.serving import _bentoml_home, _free_address
from tests.ports import free_port


@pytest.mark.parametrize(("host", "addresses"), [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1 ::1")])
def test_a_host_becomes_an_address(host: str, addresses: str) -> None:
    assert _free_address(host, free_port()) in addresses.split()


@pytest.mark.parametrize("host", ["a..b", "x" * 70, "203.0.113.1"])
def test_a_host_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(InvalidRequest, match=r"an address of this machine|cannot listen on 203\.0\.113\.1"):
        _free_address(host, free_port())


def test_a_taken_port_is_told_with_the_brackets_of_ipv6() -> None:
    try:
        taken = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 here")
    with taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidRequest, match=rf"cannot listen on \[::1\]:{port}: "):
            _free_address("::1", port)


@pytest.mark.parametrize("home", ["/proc/nowhere", "/dev/null", "{tmp}/file"])
def test_a_home_that_cannot_be_written(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("BENTOML_HOME", raising=False)
    monkeypatch.setenv("HOME", home.format(tmp=tmp_path))
    folder = Path(_bentoml_home()["BENTOML_HOME"])
    assert folder.is_dir()
    folder.rmdir()


def test_a_folder_of_bentoml_that_is_told_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("BENTOML_HOME", raising=False)
    assert _bentoml_home() == {"BENTOML_HOME": str(tmp_path / "bentoml")}
    monkeypatch.setenv("BENTOML_HOME", "/proc/told")
    assert _bentoml_home() == {}
    assert os.environ["BENTOML_HOME"] == "/proc/told"
