"""Thumbnails and originals in an object store: moto's server, over HTTP as S3 itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
from moto.server import ThreadedMotoServer

from service.errors import StoreAway
from service.store.milvus import MilvusStore
from service.store.pictures import Pictures
from tests.ports import free_port
from tests.service.store.test_contract import address
from tests.service.store.test_embedded import D, card, item, unit


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadedMotoServer]:
    """Yield a running server with the bucket `pictures`, which s3fs finds by the environment."""
    server = ThreadedMotoServer("127.0.0.1", port := free_port())
    server.start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().makedirs("pictures", exist_ok=True)
    yield server
    server.stop()


def test_pictures_in_an_object_store(tmp_path: Path, bucket: ThreadedMotoServer) -> None:
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


def test_an_object_store_that_does_not_answer(bucket: ThreadedMotoServer) -> None:
    pictures = Pictures("s3://pictures")
    name = pictures.put(item("a", unit(D)))
    bucket.stop()
    with pytest.raises(StoreAway, match="s3://pictures: cannot be used now"):
        pictures.thumbnail(name)
