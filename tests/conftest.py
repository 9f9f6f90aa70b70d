"""Fixtures and hooks for all tests: the shipped encoder, stores, pictures, a browser, and reasons for skipped tests."""

import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from service.encoding.card import read_card
from service.encoding.encoder import Encoder
from service.gallery import Gallery
from service.settings import Settings
from service.store.embedded import EmbeddedStore

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "mnist"


def missing(what: str) -> NoReturn:
    """Skip the test with this reason, or fail it if LOOKALIKE_TEST_ALL=1 promised that nothing is missing."""
    if os.environ.get("LOOKALIKE_TEST_ALL") == "1":
        pytest.fail(what)
    pytest.skip(what)


def reason_of(mark: pytest.Mark) -> str:
    """Return why a test is marked slow. Raises ValueError without a reason."""
    if len(mark.args) != 1 or not isinstance(mark.args[0], str) or not mark.args[0].strip() or mark.kwargs:
        raise ValueError(f'expected @pytest.mark.slow("why it takes so long"), got {mark.args}')
    return mark.args[0]


def some_slow(names: Iterable[str], why: str, kept: Sequence[str]) -> list[pytest.ParameterSet]:
    """Return the names as parameters of a test; those that are not `kept` are marked slow for this reason."""
    return [pytest.param(name, marks=[] if name in kept else pytest.mark.slow(why)) for name in names]


def pytest_itemcollected(item: pytest.Item) -> None:
    """Refuse a test that is marked slow without a reason."""
    for mark in item.iter_markers("slow"):
        try:
            reason_of(mark)
        except ValueError as error:
            raise pytest.UsageError(f"{item.nodeid}: {error}") from error


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List at the end of the run why tests were skipped, with the number of each reason."""
    reasons: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else "skipped"
        reasons[reason] = reasons.get(reason, 0) + 1
    for reason, count in reasons.items():
        terminalreporter.write_line(f"not run here: {count} tests: {reason}", yellow=True)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Return the folder with MNIST and photographs."""
    folder = os.environ.get("LOOKALIKE_TEST_DATA", "")
    if not folder or not (Path(folder) / "MNIST" / "raw").is_dir():
        missing("no MNIST: set LOOKALIKE_TEST_DATA to a folder with MNIST/raw as torchvision keeps it, and photos/")
    return Path(folder)


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    """Return the shipped encoder, on CPU."""
    return Encoder(read_card(MODEL), device="cpu")


@pytest.fixture
def store(tmp_path: Path, encoder: Encoder) -> Iterator[EmbeddedStore]:
    """Yield an empty store of the shipped encoder."""
    opened = EmbeddedStore(tmp_path / "store", encoder.card, encoder.dimension)
    yield opened
    opened.close()


@pytest.fixture
def gallery(tmp_path: Path, encoder: Encoder) -> Iterator[Gallery]:
    """Yield an empty gallery of the shipped encoder."""
    settings = Settings(store=tmp_path / "store")
    opened = Gallery(encoder, EmbeddedStore(settings.store, encoder.card, encoder.dimension), settings)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Yield Debian's Chromium without its update checks. Until it closes, this thread runs Playwright's event loop."""
    chromium = shutil.which("chromium")
    if chromium is None:
        missing("no Chromium: install Debian's package chromium")
    flags = ["no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"]
    flags += ["disable-component-update", "disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[f"--{flag}" for flag in flags])
        yield browser
        browser.close()


def another_encoder(folder: Path, resample: int = 0) -> Path:
    """Write the shipped encoder with another preprocessing, which is another embedding space; return its folder."""
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(config | {"resample": resample}))
    facts = json.loads((folder / "card.json").read_text())
    (folder / "card.json").unlink()
    for variant in folder.glob("model.*.onnx"):
        variant.unlink()
    facts |= {"name": "other", "fingerprint": read_card(folder).fingerprint, "sha256": {}}
    (folder / "card.json").write_text(json.dumps(facts))
    return folder


def encoded(picture: Image.Image, format: str = "PNG", **options: object) -> bytes:
    """Return a picture as a file's bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def scene(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    """Return a smooth coloured picture with another colour in each corner."""
    corners = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)
