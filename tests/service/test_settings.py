"""Settings from the environment, and the limits that follow from them for strangers and for one's own files."""

from dataclasses import asdict

import pytest

from service.encoding.images import decode
from service.encoding.limits import OWN_FILES, Limits
from service.errors import InvalidRequest, TooLarge
from service.settings import Settings, read_own_settings, read_settings
from tests.service.encoding.test_images import png_header


def test_ones_own_files_have_wider_limits_unless_they_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings().limits == Limits()
    assert read_own_settings().limits == OWN_FILES
    assert OWN_FILES.max_pixels == 250_000_000
    monkeypatch.setenv("LOOKALIKE_MAX_PIXELS", "1000")
    for settings in (read_settings(), read_own_settings()):
        with pytest.raises(TooLarge, match=r"1000 pixels \(LOOKALIKE_MAX_PIXELS\)"):
            decode(png_header(50, 50), 28, settings.limits)
    assert asdict(read_own_settings().limits) == asdict(OWN_FILES) | {"max_pixels": 1000}
    monkeypatch.setenv("LOOKALIKE_MAX_PIXELS", "many")
    with pytest.raises(InvalidRequest, match="LOOKALIKE_MAX_PIXELS"):
        read_own_settings()


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
