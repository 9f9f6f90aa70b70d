"""Each guard of the service is removed, one at a time; each time a test must fail."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.proofs.guards import REMOVALS
from tests.proofs.removal import Outcome, Prover, Removal, change, code, refusal

pytestmark = [pytest.mark.proof, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def prover() -> Prover:
    return Prover()


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, prover: Prover) -> Iterator[dict[Removal, "Future[Outcome]"]]:
    """The outcome of each guard chosen for this run; guards are removed in parallel, one on each core."""
    started = time.monotonic()
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    removals: list[Removal] = [params["removal"] for params in calls if "removal" in params]

    def take_out(removal: Removal) -> Outcome:
        return prover.run(change(removal), prover.select(removal))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = {removal: pool.submit(take_out, removal) for removal in removals}
        yield running
    noticed = sum(one.exception() is None and bool(one.result().failed) for one in running.values())
    print(f"\n{len(running)} guards removed, {noticed} noticed, {time.monotonic() - started:.0f} s")


def test_the_named_tests_pass_while_all_guards_are_in_place(prover: Prover) -> None:
    """Otherwise a failure without the guard would prove nothing."""
    tests = {test: None for removal in REMOVALS for test in prover.select(removal)}
    outcome = prover.run(None, list(tests))
    assert not outcome.failed, outcome.output[-2000:]
    assert f"{len(tests)} passed" in outcome.output, outcome.output[-2000:]


@pytest.mark.parametrize("removal", REMOVALS, ids=str)
def test_a_guard_that_is_gone_is_noticed(outcomes: dict[Removal, "Future[Outcome]"], removal: Removal) -> None:
    outcome = outcomes[removal].result()
    assert outcome.failed, f"no test failed:\n{outcome.output[-2000:]}"


def test_a_guard_that_is_not_found_is_an_error_with_candidates() -> None:
    with pytest.raises(LookupError, match=r"(?s)guard not found: .*candidates:.*the picture has more than \{\} scans"):
        change(refusal("the picture has more than {} skans"))
    with pytest.raises(LookupError, match=r"(?s)guard not found: check_count: .*candidates:.*images > settings"):
        change(code("check_count", "images >= settings.max_images", "False"))


def test_a_removal_that_changes_nothing_is_not_noticed(prover: Prover) -> None:
    removal = code("check_count", "images > settings.max_images", "images > settings.max_images", "test_refused[33 in")
    outcome = prover.run(change(removal), prover.select(removal))
    assert not outcome.failed
    assert "passed" in outcome.output
