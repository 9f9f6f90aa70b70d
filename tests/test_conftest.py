"""A test is marked slow with a reason, or not at all."""

import pytest

from tests.conftest import reason_of


def test_a_slow_test_has_one_reason() -> None:
    assert reason_of(pytest.mark.slow("starts a service").mark) == "starts a service"
    for mark in (pytest.mark.slow, pytest.mark.slow(" "), pytest.mark.slow(40), pytest.mark.slow("a", "b")):
        with pytest.raises(ValueError, match="why it takes so long"):
            reason_of(mark.mark)
