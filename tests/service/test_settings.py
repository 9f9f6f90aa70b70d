"""Limits for strangers and for one's own files."""

from dataclasses import asdict

import pytest

from service.encoding.images import OWN_FILES, Limits, decode
from service.errors import InvalidRequest, TooLarge
from service.settings import read_own_settings, read_settings
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
