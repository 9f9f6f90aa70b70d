"""What was measured as the fastest is used again, and only where it would be measured again."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.encoding.card import Card
from service.encoding.encoder import Encoder
from service.gallery import open_gallery
from service.kept_choice import FILE, keep_choice, open_encoder
from service.serving import check
from service.settings import Settings
from tests.conftest import MODEL
from tests.ports import free_port
from tests.service.encoding.test_encoder import SAME, card, scaled_graph


@pytest.fixture
def varied() -> Card:
    """An encoder whose int8 file is the faster one: 400 products of matrices are slow everywhere."""
    return replace(card(scaled_graph(SAME, slow=400)), variants={"int8": scaled_graph(SAME)})


def settings(folder: Path, **changes: Any) -> Settings:
    return Settings(**{"store": folder, "variant": "auto", "runtime": "onnxruntime", "device": "cpu", **changes})


def start(folder: Path, encoder: Card, **changes: Any) -> Encoder:
    """Open an encoder as a start does, and keep what was measured."""
    chosen = settings(folder, **changes)
    opened = open_encoder(chosen, encoder)
    keep_choice(chosen, opened)
    return opened


def test_a_second_start_times_nothing(tmp_path: Path, varied: Card) -> None:
    first = start(tmp_path, varied)
    assert (first.compared, first.variant) == (True, "int8")
    kept = (tmp_path / FILE).read_bytes()
    second = start(tmp_path, varied)
    assert (second.compared, second.choice) == (False, first.choice)
    assert (tmp_path / FILE).read_bytes() == kept


def test_another_machine_version_encoder_or_wish_measures_again(
    tmp_path: Path, varied: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path, varied)
    kept = json.loads((tmp_path / FILE).read_bytes())
    for name in kept.keys() - {"choice"}:
        (tmp_path / FILE).write_text(json.dumps(kept | {name: "another"}))
        assert start(tmp_path, varied).compared, name
        assert json.loads((tmp_path / FILE).read_bytes()) == kept
    assert start(tmp_path, replace(varied, fingerprint="1" * 64)).compared
    assert start(tmp_path, replace(varied, variants={"int8": scaled_graph(SAME, slow=1)})).compared
    assert start(tmp_path, varied).compared
    assert not start(tmp_path, varied).compared
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert start(tmp_path, varied).compared
    # A variant that was asked for by name is the one.
    assert start(tmp_path, varied, variant="fp32").variant == "fp32"


def test_a_damaged_file_measures_again(tmp_path: Path, varied: Card) -> None:
    start(tmp_path, varied)
    whole = (tmp_path / FILE).read_bytes()
    kept = json.loads(whole)
    choices = [kept | {"choice": one} for one in ("", None, 7, "fp32", f"{'0' * 64}:onnxruntime:fp32")]
    # Whole, but it names what cannot run.
    choices.append(kept | {"choice": f"{varied.fingerprint}:onnxruntime:fp16"})
    others = [json.dumps(one).encode() for one in (*choices, None, [], "text", {})]
    for content in (b"", b"\x00" * 200, b"\xff", whole[:-20], whole[5:], *others):
        (tmp_path / FILE).write_bytes(content)
        encoder = start(tmp_path, varied)
        assert (encoder.compared, encoder.variant) == (True, "int8"), content
        assert (tmp_path / FILE).read_bytes() == whole


def test_nothing_is_kept_without_a_measurement_or_a_store(tmp_path: Path, varied: Card) -> None:
    start(tmp_path, varied, variant="int8")
    start(tmp_path, card(scaled_graph(SAME)))
    start(tmp_path, varied, no_store=True)
    start(tmp_path, varied, read_only=True)
    assert not [*tmp_path.iterdir()]
    start(tmp_path / "not-there", varied)
    assert not [*tmp_path.iterdir()]
    # What a store has kept is nothing to a service without one.
    start(tmp_path, varied)
    assert start(tmp_path, varied, no_store=True).compared
    # A reader of the store takes it, and does not write it.
    assert not start(tmp_path, varied, read_only=True).compared


def test_the_commands_keep_it_in_the_store(tmp_path: Path) -> None:
    """models/mnist has an int8 file, so there is something to measure."""
    chosen = settings(tmp_path / "store", model=MODEL, port=free_port())
    with closing(open_gallery(chosen)) as gallery:
        assert gallery.encoder.compared
        found = gallery.encoder.choice
    assert json.loads((tmp_path / "store" / FILE).read_bytes())["choice"] == found
    told, _ = check(chosen)
    assert told.measured == found
    with closing(open_gallery(chosen)) as gallery:
        assert not gallery.encoder.compared
        assert gallery.encoder.choice == found
