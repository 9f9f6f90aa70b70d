"""Settings from the environment."""

import pytest

from service.errors import InvalidRequest
from service.settings import Settings, read_settings


@pytest.mark.parametrize("name", Settings.model_fields)
@pytest.mark.parametrize("empty", ["", " ", "\n"])
def test_an_empty_variable_is_unset(name: str, empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(f"LOOKALIKE_{name.upper()}", raising=False)
    unset = read_settings()
    monkeypatch.setenv(f"LOOKALIKE_{name.upper()}", empty)
    assert read_settings() == unset


@pytest.mark.parametrize(
    ("told", "path"),
    [("/a", "/a"), ("a", "/a"), ("/a/", "/a"), ("/a/b.c/", "/a/b.c"), ("/", ""), ("/~me/x-y_z", "/~me/x-y_z")],
)
def test_a_path_of_a_proxy(told: str, path: str) -> None:
    assert read_settings(root_path=told).root_path == path


@pytest.mark.parametrize("told", ["https://example.org/a", "/a b", '/"', "/a/../b", "/a//b", "/.a", "/é"])
def test_what_is_no_path_of_a_proxy_is_refused(told: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^LOOKALIKE_ROOT_PATH: "):
        read_settings(root_path=told)


def test_a_host_in_brackets_is_taken_without_them() -> None:
    assert read_settings(host="[::1]").host == "::1"
