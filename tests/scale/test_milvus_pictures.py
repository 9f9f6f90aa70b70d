"""Thumbnails and originals in an object store: moto's server, over HTTP as S3 itself."""

import urllib.error
import urllib.request
from pathlib import Path

import pytest
import s3fs

from service.errors import StoreAway
from service.store.milvus import MilvusStore
from service.store.pictures import Pictures
from tests.conftest import MODEL, encoded, scene
from tests.scale.unsteady_storage import UnsteadyStorage, never
from tests.service.store.test_contract import address
from tests.service.store.test_embedded import D, card, item, unit
from tests.serving import running


def test_pictures_in_an_object_store(tmp_path: Path, storage: UnsteadyStorage) -> None:
    store = MilvusStore(address(tmp_path), card(), D, pictures="s3://pictures/of/mine")
    store.add([item("a", unit(D)), item("b", unit(D))])
    store.add([item("a", unit(D, seed=1))])
    assert store.thumbnail("a") == b"thumbnail of a"
    assert store.original("a") is None
    files = s3fs.S3FileSystem(skip_instance_cache=True)
    assert len(files.find("pictures/of/mine")) == 2
    store.remove("a")
    assert store.thumbnail("a") is None
    assert len(files.find("pictures/of/mine", refresh=True)) == 1
    store.close()


def test_an_object_store_that_does_not_answer(storage: UnsteadyStorage) -> None:
    pictures = Pictures("s3://pictures")
    name = pictures.put(item("a", unit(D)))
    storage.stop()
    with pytest.raises(StoreAway, match="s3://pictures: cannot be used now"):
        pictures.thumbnail(name)


def test_500_now_and_then_is_tried_again(storage: UnsteadyStorage) -> None:
    storage.refuse(lambda _, before: not before)
    pictures = Pictures("s3://pictures")
    name = pictures.put(item("a", unit(D)))
    assert pictures.thumbnail(name) == b"thumbnail of a"
    pictures.remove([name])
    assert pictures.thumbnail(name) is None
    assert storage.refused > 3


def test_the_service_says_when_to_come_back_and_recovers(tmp_path: Path, storage: UnsteadyStorage) -> None:
    def asked(method: str, path: str, body: bytes | None = None) -> tuple[int, str | None]:
        request = urllib.request.Request(f"{url}{path}", body, method=method)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, None
        except urllib.error.HTTPError as error:
            return error.code, error.headers["Retry-After"]

    flags = ("--model", str(MODEL), "--store", f"milvus:{tmp_path}/store.db/pictures")
    with running(tmp_path, *flags, pictures="s3://pictures/of/mine") as (_, url, log):
        assert asked("PUT", "/images/kept", encoded(scene())) == (201, None)
        storage.refuse(lambda request, _: "/pictures/of/mine/" in request)
        assert asked("GET", "/images/kept/thumbnail") == (503, "5")
        assert asked("PUT", "/images/new", encoded(scene(seed=1))) == (503, "5")
        # The picture is not there by half.
        assert asked("GET", "/images/new") == (404, None)
        assert asked("GET", "/readyz") == (200, None)
        storage.refuse(never)
        assert asked("PUT", "/images/new", encoded(scene(seed=1))) == (201, None)
        for name in ("kept", "new"):
            assert asked("GET", f"/images/{name}/thumbnail") == (200, None)
        assert "Traceback" not in log.read_text()
