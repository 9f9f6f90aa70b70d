"""Another encoder for a store: a new generation is built beside the served one and then replaces it."""

import shutil
from pathlib import Path

import pytest

from service.encoding.card import read_card
from service.encoding.encoder import Encoder
from service.errors import InvalidRequest, InvalidStore, StoreMismatch
from service.gallery import follow_reindex, open_gallery, succeed
from service.generations import prune
from service.jobs.index import index_source
from service.jobs.reindex import reindex, rollback
from service.queries import PictureQuery
from service.serving import check
from service.settings import Settings
from service.sources import open_source
from service.store.embedded import EmbeddedStore
from service.store.layout import current
from tests.conftest import MODEL, another_encoder, encoded, scene
from tests.ports import free_port

GOLDEN = Path(__file__).parents[1] / "golden_store"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return another_encoder(tmp_path / "other")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(store=tmp_path / "store", device="cpu", variant="fp32")


def test_a_store_goes_over_to_another_encoder_while_it_is_served(settings: Settings, other: Path) -> None:
    served = open_gallery(settings)
    index_source(open_source("digits[:30]", Path("data")), served)
    served.remove("digits/00003")
    with pytest.raises(InvalidStore, match="no other generation counts"):
        succeed(served)
    served.add("before", encoded(scene(seed=1)), {"n": 1})

    assert reindex(other, settings) == 30
    assert current(settings.store) == settings.store / "generation-2"
    # The service uses the generation that it has open until it switches.
    served.add("after", encoded(scene(seed=2)), {"n": 2})
    served.change_metadata("before", {"n": 3})
    served.remove("digits/00004")
    assert served.find([PictureQuery(encoded(scene(seed=2)))], 1)[0][0].id == "after"

    following = succeed(served)
    assert following.card.name == "other"
    assert following.store.count() == served.store.count() == 30
    assert following.get("before").metadata == {"n": 3}
    assert [item.id for item in following.store.scan(99)[0]] == [item.id for item in served.store.scan(99)[0]]
    for id in ("after", "before", "digits/00005"):
        picture = served.original(id)
        assert following.original(id) == picture
        assert following.find([PictureQuery(picture)], 1)[0][0].id == id
        assert following.find([PictureQuery(picture)], 1)[0][0].score > 0.9999
    # Only the new generation accepts changes, and it holds the folder's lock.
    with pytest.raises(InvalidStore, match="replaced by one of another encoder"):
        served.add("late", encoded(scene()), {})
    served.close()
    following.add("new", encoded(scene()), {})
    with pytest.raises(InvalidStore, match="in use by process"):
        open_gallery(settings)
    following.close()
    again = open_gallery(settings)
    assert again.card.name == "other"
    assert again.store.count() == 31
    again.close()
    with pytest.raises(StoreMismatch, match=r"built by the encoder other .* not by mnist"):
        open_gallery(settings.model_copy(update={"model": MODEL}))


def test_a_store_of_the_earlier_mnist_is_refused_with_both_names_and_comes_over(tmp_path: Path) -> None:
    """The encoder of this name had no whitening once, so its embeddings belonged to another space."""
    settings = Settings(store=tmp_path / "store", model=MODEL, device="cpu", variant="fp32")
    shutil.copytree(GOLDEN, settings.store)
    earlier, now = "7630ccfe790b", read_card(MODEL).fingerprint[:12]
    with pytest.raises(
        StoreMismatch, match=rf"built by the encoder mnist \({earlier}…\), not by mnist \({now}…\)"
    ) as said:
        open_gallery(settings)
    assert f"`lookalike reindex --model {MODEL} --store {settings.store}`" in str(said.value)
    assert reindex(MODEL, settings) == 20
    gallery = open_gallery(settings)
    assert (gallery.card.name, gallery.store.count(), gallery.encoder.dimension) == ("mnist", 20, 128)
    digit = open_source("digits[:20]").entry(7)
    assert gallery.find([PictureQuery(digit.data)], 1)[0][0].id == digit.id
    assert gallery.find([PictureQuery(digit.data)], 1)[0][0].score > 0.9999
    gallery.close()


def test_what_changed_before_a_restart_is_taken_over_at_the_next_start(settings: Settings, other: Path) -> None:
    served = open_gallery(settings)
    served.add("a", encoded(scene(seed=1)), {})
    reindex(other, settings)
    served.add("b", encoded(scene(seed=2)), {})
    served.remove("a")
    served.close()
    again = open_gallery(settings)
    assert again.card.name == "other"
    assert [item.id for item in again.store.scan(9)[0]] == ["b"]
    # An item added to the new generation survives the next start.
    again.add("a", encoded(scene(seed=1)), {})
    again.close()
    again = open_gallery(settings)
    assert [item.id for item in again.store.scan(9)[0]] == ["b", "a"]
    again.close()
    with pytest.raises(InvalidRequest, match="is of the encoder other already"):
        reindex(other, settings)
    # The store is switched back to the first encoder.
    reindex(MODEL, settings)
    assert current(settings.store).name == "generation-3"
    again = open_gallery(settings)
    assert again.card.name == "mnist"
    assert again.store.count() == 2
    again.close()


def test_pictures_that_were_not_kept_are_read_where_they_came_from(tmp_path: Path, other: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for n in range(4):
        (pictures / f"{n}.png").write_bytes(encoded(scene(seed=n)))
    settings = Settings(store=tmp_path / "store", device="cpu", variant="fp32")
    served = open_gallery(settings)
    index_source(open_source(str(pictures), Path("data")), served)
    served.add("sent", encoded(scene(seed=5)), {})
    (pictures / "1.png").write_bytes(encoded(scene(seed=9)))
    (pictures / "2.png").unlink()
    with pytest.raises(InvalidStore, match=r"2 items cannot be embedded again; 1.png: .* has another by now"):
        reindex(other, settings)
    # No generation was published.
    assert current(settings.store) == settings.store
    (pictures / "1.png").write_bytes(encoded(scene(seed=1)))
    with pytest.raises(InvalidStore, match=r"1 items cannot be embedded again; 2.png: .* cannot be read from"):
        reindex(other, settings)
    served.remove("2.png")
    assert reindex(other, settings) == 4
    served.close()
    again = open_gallery(settings)
    assert [again.store.original(id) is None for id in ("0.png", "1.png", "3.png", "sent")] == [True, True, True, False]
    again.close()


def test_a_current_that_names_nothing_is_said(settings: Settings, encoder: Encoder) -> None:
    EmbeddedStore(settings.store, encoder.card, encoder.dimension).close()
    for text in ("generation-7", "../elsewhere", ""):
        (settings.store / "CURRENT").write_text(text)
        with pytest.raises(InvalidStore, match="CURRENT: damaged: it names no generation that is there"):
            EmbeddedStore(settings.store, encoder.card, encoder.dimension)
        assert (settings.store / "CURRENT").read_text() == text


def test_a_rollback_keeps_what_changed_since(settings: Settings, other: Path) -> None:
    served = open_gallery(settings.model_copy(update={"model": MODEL}))
    with pytest.raises(InvalidRequest, match="has no earlier generation"):
        rollback(settings)
    for n in range(3):
        served.add(f"p{n}", encoded(scene(seed=n)), {})
    before = served.store.embedding("p0")
    assert reindex(other, settings) == 3
    # The service has not taken it up, so there is nothing to bring back.
    assert rollback(settings) == ("mnist", 3)
    assert current(settings.store) == settings.store
    served.add("late", encoded(scene(seed=7)), {})
    assert reindex(other, settings) == 4
    following = succeed(served)
    served.close()
    following.add("new", encoded(scene(seed=8)), {})
    following.remove("p1")
    following.change_metadata("p2", {"seen": True})

    assert rollback(settings) == ("mnist", 4)
    following.add("newest", encoded(scene(seed=9)), {})
    back = succeed(following)
    following.close()
    assert back.card.name == "mnist"
    assert sorted(item.id for item in back.store.scan(9)[0]) == ["late", "new", "newest", "p0", "p2"]
    assert back.get("p2").metadata == {"seen": True}
    now = back.store.embedding("p0")
    assert before is not None
    assert now is not None
    assert (before == now).all()
    for n, id in ((0, "p0"), (8, "new"), (9, "newest")):
        assert back.find([PictureQuery(encoded(scene(seed=n)))], 1)[0][0].id == id
    assert [one.number for one in prune(settings.store)] == [1, 2]
    back.close()


def test_a_second_reindex_before_the_service_knows_of_the_first_loses_nothing(settings: Settings, other: Path) -> None:
    served = open_gallery(settings.model_copy(update={"model": MODEL}))
    served.add("a", encoded(scene(seed=1)), {})
    reindex(other, settings)
    third = another_encoder(other.with_name("third"), resample=1)
    reindex(third, settings)
    served.add("b", encoded(scene(seed=2)), {})
    served.remove("a")
    following = succeed(served)
    served.close()
    assert [item.id for item in following.store.scan(9)[0]] == ["b"]
    following.close()


def test_an_unfinished_generation_of_a_third_encoder_is_named(settings: Settings, other: Path) -> None:
    gallery = open_gallery(settings.model_copy(update={"model": MODEL}))
    gallery.add("a", encoded(scene(seed=1)), {})
    gallery.close()
    left = Encoder(read_card(other), "cpu")
    EmbeddedStore(settings.store / "generation-2", left.card, left.dimension).close()
    third = another_encoder(other.with_name("third"), resample=1)
    with pytest.raises(StoreMismatch, match=r"unfinished reindex with the encoder other .* `lookalike store prune`"):
        reindex(third, settings)
    assert [one.number for one in prune(settings.store)] == [2]
    assert reindex(third, settings) == 1


def test_a_new_generation_knows_where_its_pictures_came_from(settings: Settings, other: Path, tmp_path: Path) -> None:
    """The prefixes of sources are remembered, and a picture that moved is known at its new place."""
    gallery = open_gallery(settings)
    for number, folder in enumerate(("2023", "2024")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "IMG_0000.png").write_bytes(encoded(scene(seed=number)))
        index_source(open_source(str(tmp_path / folder)), gallery)
    gallery.close()
    reindex(other, settings)
    (tmp_path / "2023").rename(tmp_path / "moved")
    gallery = open_gallery(settings)
    assert gallery.card.name == "other"
    for folder in ("2024", "moved"):
        account = index_source(open_source(str(tmp_path / folder)), gallery)
        assert (account.added, account.replaced, account.known) == (0, 0, 1)
    sources = {item.id: item.source for item in gallery.store.scan(9)[0]}
    assert sources == {
        "IMG_0000.png": f"{tmp_path}/moved/IMG_0000.png",
        "2024/IMG_0000.png": f"{tmp_path}/2024/IMG_0000.png",
    }
    gallery.close()


def test_settings_that_name_the_replaced_encoder_follow_the_store(
    settings: Settings, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = settings.model_copy(update={"model": MODEL})
    assert follow_reindex(fixed) == (fixed, "")
    gallery = open_gallery(fixed)
    gallery.add("a", encoded(scene(seed=1)), {})
    gallery.close()
    assert follow_reindex(fixed) == (fixed, "")
    reindex(other, settings)
    for _ in range(2):
        followed, warning = follow_reindex(fixed)
        assert followed == settings
        assert f"a reindex has replaced the encoder {MODEL} by {other}, which is served" in warning
        open_gallery(followed).close()
        # `lookalike serve --model OLD` goes this way.
        assert check(fixed.model_copy(update={"port": free_port()}))[0].model == other
        assert warning in capsys.readouterr().err
        # The second time the first generation is gone, and the store remembers its encoder.
        prune(settings.store)
    # An encoder that the store never had is refused when the store is opened.
    third = settings.model_copy(update={"model": another_encoder(other.with_name("third"), resample=1)})
    assert follow_reindex(third) == (third, "")
    with pytest.raises(StoreMismatch):
        open_gallery(third)
