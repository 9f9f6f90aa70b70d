"""A typed client that openapi-python-client generates from our document adds, filters, patches and deletes."""

import importlib
import io
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.sources import open_source
from tests.serving import serving

pytestmark = [pytest.mark.proof, pytest.mark.timeout(600)]

KEY = "0123456789abcdef"
PICTURE = open_source("digits").read(30)
# The generator knows JSON, text and bytes. Its setting for other media types says which of them they are.
BYTES = ("image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp")
CONFIG = {
    "content_type_overrides": dict.fromkeys(BYTES, "application/octet-stream") | {"application/x-ndjson": "text/plain"}
}


class Generated:
    """The modules of the client, and a connection of it."""

    def __init__(self, url: str) -> None:
        self.models: Any = importlib.import_module("generated.models")
        self.types: Any = importlib.import_module("generated.types")
        self.client: Any = importlib.import_module("generated").AuthenticatedClient(base_url=url, token=KEY)

    def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Call an operation, such as images.put_image, and return its answer with all details."""
        operation: Any = importlib.import_module(f"generated.api.{name}")
        return operation.sync_detailed(*arguments, client=self.client, **options)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generated]:
    """Yield a client that was generated from the document of a running service with twenty digits."""
    folder = tmp_path_factory.mktemp("client")
    with serving(folder, "digits[:20]", api_keys=f"write:{KEY}") as url, pytest.MonkeyPatch.context() as patch:
        request = urllib.request.Request(f"{url}/openapi.json", headers={"Authorization": f"Bearer {KEY}"})
        (folder / "openapi.json").write_bytes(urllib.request.urlopen(request, timeout=30).read())
        (folder / "config.json").write_text(json.dumps(CONFIG))
        command = [str(Path(sys.executable).with_name("openapi-python-client")), "generate", "--meta", "none"]
        command += ["--path", str(folder / "openapi.json"), "--config", str(folder / "config.json")]
        done = subprocess.run(
            [*command, "--output-path", str(folder / "generated")], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        # What it leaves out is a warning: formats of a body that it cannot send beside one that it can.
        assert "omitted from generated client" not in done.stdout, done.stdout
        patch.syspath_prepend(folder)
        yield Generated(url)


def test_the_life_of_an_item(generated: Generated) -> None:
    models, types = generated.models, generated.types
    for id in ("holiday/a b.png", "thumbnail", "holiday/thumbnail", "a%2Fthumbnail", "../content"):
        added = generated.call("images.put_image", id, body=types.File(io.BytesIO(PICTURE), mime_type="image/png"))
        assert (added.status_code, added.parsed.id) == (201, id)

        patch = models.PatchBody.from_dict({"metadata": {"tags": ["red", "blue"], "year": 2001, "place": {"a": "b"}}})
        changed = generated.call("images.patch_image", id, body=patch)
        assert changed.parsed.metadata.to_dict() == patch.metadata.to_dict()

        filters = {"tags": "red", "year": {"$gte": 2000}, "place.a": "b", "$not": {"label": "7"}}
        body = models.SearchById(id="digits/00007", k=30, filter_=models.Filter.from_dict(filters))
        assert body.to_dict()["filter"] == filters
        found = generated.call("search.search", body=body)
        assert [hit.id for hit in found.parsed.hits] == [id]
        assert found.parsed.hits[0].metadata.to_dict()["year"] == 2001

        assert generated.call("images.get_image", id).parsed.id == id
        assert generated.call("images.get_thumbnail", id).parsed.payload.read()[8:12] == b"WEBP"
        assert generated.call("images.get_content", id).parsed.payload.read() == PICTURE
        assert generated.call("images.delete_image", id).status_code == 204
        gone = generated.call("images.get_image", id)
        assert (gone.status_code, gone.parsed.code) == (404, "not_found")


def test_many_pictures_and_their_lines(generated: Generated) -> None:
    types = generated.types
    files = [types.File(io.BytesIO(PICTURE), f"many/{n}.png", "image/png") for n in range(2)]
    added = generated.call("images.add_images", body=generated.models.AddImagesFilesBody(file=files))
    lines = [json.loads(line) for line in added.parsed.splitlines()]
    assert [(line["id"], line["status"]) for line in lines] == [("many/0.png", 201), ("many/1.png", 201)]
    page = generated.call("images.list_images", limit=1000).parsed
    assert {"many/0.png", "many/1.png", "digits/00019"} <= {item.id for item in page.items}
    for line in lines:
        assert generated.call("images.delete_image", line["id"]).status_code == 204


def test_embeddings_and_facts(generated: Generated) -> None:
    body = generated.types.File(io.BytesIO(PICTURE), mime_type="image/png")
    (embedding,) = generated.call("embeddings.embed", body=body).parsed.embeddings
    facts = generated.call("service.get_info").parsed
    assert len(embedding) == facts.dimension == 128
