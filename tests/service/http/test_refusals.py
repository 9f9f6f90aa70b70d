"""What the service refuses, and the odd things that it does not: a row for each, with the exact status and code."""

import base64
import io
import json
import os
import pickle
import re
import select
import socket
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote_to_bytes

import httpx2
import numpy as np
import psutil
import pytest
from PIL import Image
from starlette.testclient import TestClient

from service.encoding.encoder import Encoder
from service.gallery import Gallery
from service.http.guard import Guard
from service.http.routes import create_app
from service.http.slots import Slots
from service.settings import Settings
from service.store.embedded import EmbeddedStore
from tests.conftest import encoded, scene
from tests.service.conftest import Served
from tests.service.encoding.test_images import png_header
from tests.serving import serving

JSON = "application/json"
FORM = "multipart/form-data; boundary=row"
ZIP = "application/zip"
PICTURE = encoded(scene())
OTHER = encoded(scene(seed=1))
BASE64 = base64.b64encode(PICTURE).decode()
TEXT = b"zebras quickly jump over lazy wizards and their boxes"
WRONG = "f0e1d2c3" * 8  # no encoder's fingerprint
# Words of ours that an answer may say though the client wrote them, too.
OUR_WORDS = re.compile(
    rb"metadata|dimensions|encoding_format|fingerprint|threshold|/thumbnail|/content|data:image/|base64|127\.0\.0\.1"
)
RUN = 8  # bytes; so many of the client's in a row are an echo


class Row(NamedTuple):
    """A request and the refusal that must come back."""

    name: str
    status: int
    code: str
    content: bytes = PICTURE
    type: str = ""
    path: str = "/embed"
    method: str = "POST"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, encoder: Encoder) -> Iterator[TestClient]:
    """The service by its default settings, with one item in it, `kept`."""
    app, settings = create_app(), Settings()
    store = EmbeddedStore(tmp_path_factory.mktemp("refusals") / "store", encoder.card, encoder.dimension)
    app.state.gallery = Gallery(encoder, store, settings)
    app.state.slots = Slots(settings.max_waiting, settings.work_timeout_s)
    with TestClient(Guard(app, settings), raise_server_exceptions=False) as opened:
        assert opened.put("/images/kept", content=PICTURE).status_code == 201
        yield opened
    app.state.slots.close()
    app.state.gallery.close()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A socket that listens on 127.0.0.1; nobody may knock."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening
        assert not select.select([listening], [], [], 0.2)[0], "the service fetched an address that a client sent"


def send(client: TestClient, row: Row) -> Any:
    headers = {"content-type": row.type} if row.type else {}
    return client.request(row.method, row.path, content=row.content, headers=headers)


def assert_refused(answer: Any, status: int, code: str, sent: bytes = b"") -> None:
    """The frame that every refusal has; nothing in it is the client's."""
    assert answer.status_code == status, answer.text[:500]
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert (problem["status"], problem["code"]) == (status, code), problem
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert_no_echo(answer, sent)


def assert_no_echo(answer: Any, sent: bytes) -> None:
    theirs = OUR_WORDS.sub(b"\0", sent[:200_000])
    said = answer.content + b"\n" + b"\n".join(value for _, value in answer.headers.raw)
    echoed = {said[start : start + RUN] for start in range(len(said) - RUN + 1)}
    assert not [run for run in echoed if run in theirs], said


def sent_by(row: Row) -> bytes:
    return row.content + b"\n" + unquote_to_bytes(row.path) + b"\n"


# Bodies ------------------------------------------------------------------------------------------


def form(*files: tuple[str, bytes], **texts: str) -> bytes:
    """A multipart form with pictures in the field `file`."""
    parts = [('name="file"; filename="%s"' % name, data) for name, data in files]
    parts += [('name="%s"' % name, text.encode()) for name, text in texts.items()]
    body = b"".join(
        b"--row\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (head.encode(), data) for head, data in parts
    )
    return body + b"--row--\r\n"


def zipped(*members: tuple[str, bytes], packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packing) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def encrypted(archive: bytes) -> bytes:
    """Say of a zip's first member that it is encrypted, in both of its headers."""
    marked = bytearray(archive)
    marked[marked.index(b"PK\x03\x04") + 6] |= 1
    marked[marked.index(b"PK\x01\x02") + 8] |= 1
    return bytes(marked)


def damaged_inside(archive: bytes) -> bytes:
    """Overwrite some of the first member's packed bytes."""
    return archive[:100] + b"\xff" * 50 + archive[150:]


def understated(archive: bytes, size: int) -> bytes:
    """Say of a zip's first member that it unpacks to no more than this."""
    lie = bytearray(archive)
    struct.pack_into("<I", lie, lie.index(b"PK\x03\x04") + 22, size)
    struct.pack_into("<I", lie, lie.index(b"PK\x01\x02") + 24, size)
    return bytes(lie)


def as_json(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def nested(levels: int, inner: str = "1") -> str:
    return '{"a": ' * levels + inner + "}" * levels


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def gif_of_many_frames(first: bytes, more: int) -> bytes:
    """A GIF whose first frame is this one's and whose others cannot be decoded: their codes make no sense."""
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 64, 48, 0) + b"\x02\x04\xff\xff\xff\xff\x00"
    assert first.endswith(b"\x3b")
    return first[:-1] + frame * more + b"\x3b"


PICKLE = pickle.dumps({"a": Path("somewhere"), "b": 1})
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 200
SVG = b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><script>alert('svg')</script></svg>"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n/showpage { (%pipe%id) (r) file } def\n%%EOF\n"

PICTURES = [
    Row("nothing", 400, "empty_picture", b""),
    Row("nothing, as image/png", 400, "empty_picture", b"", "image/png"),
    Row("text", 415, "unsupported_format", TEXT),
    Row("SVG", 415, "unsupported_format", SVG, "image/svg+xml"),
    Row("HEIC", 415, "unsupported_format", HEIC, "image/heic"),
    Row("EPS", 415, "unsupported_format", EPS, "image/x-eps"),
    Row("TIFF", 415, "unsupported_format", encoded(scene(), "TIFF"), "image/tiff"),
    Row("PDF", 415, "unsupported_format", encoded(scene(), "PDF"), "image/png"),
    Row("9,000 x 9,000", 413, "too_large", png_header(9_000, 9_000)),
    Row("50,000 x 50,000", 413, "too_large", png_header(50_000, 50_000)),
    Row("10,000 x 1", 413, "too_large", png_header(10_000, 1)),
    Row("1 x 10,000", 413, "too_large", png_header(1, 10_000)),
    Row("0 x 0", 422, "undecodable_picture", png_header(0, 0)),
    Row("over max_image_bytes", 413, "too_large", PICTURE + b"\0" * 10_000_001),
    Row("33 in a form", 413, "too_large", form(*[("name", PICTURE)] * 33), FORM),
    Row("33 in JSON", 413, "too_large", as_json(images=[BASE64] * 33), JSON),
    Row("33 in queries", 413, "too_large", as_json(queries=[{"image": BASE64}] * 33), JSON, "/search"),
    Row("65 queries", 413, "too_large", as_json(queries=[{"id": "kept"}] * 65), JSON, "/search"),
    Row("one bad of three", 415, "unsupported_format", form(("a", PICTURE), ("b", TEXT), ("c", PICTURE)), FORM),
    Row("text as a form's file", 415, "unsupported_format", form(("a", TEXT)), FORM),
    Row("form without a file", 400, "invalid_request", form(other="some text"), FORM),
    Row("form cut short", 400, "invalid_request", form(("a", PICTURE))[:-9], FORM),
    Row(
        "form of two pictures to a search",
        400,
        "invalid_request",
        form(("a", PICTURE), ("b", PICTURE)),
        FORM,
        "/search",
    ),
    Row(
        "form with a field of no name",
        400,
        "invalid_request",
        form(("a", PICTURE)).replace(b'name="file"; ', b""),
        FORM,
    ),
    Row("form with nine texts", 400, "invalid_request", form(("a", PICTURE), **{f"t{n}": "x" for n in range(9)}), FORM),
]

TYPES = [
    Row(f"{name} as {kind}", 415, "unsupported_format", content, kind)
    for name, content in (("pickle", PICKLE), ("picture", PICTURE))
    for kind in ("application/x-pickle", "application/vnd.bentoml+pickle", "text/plain", "application/zip")
] + [
    Row("pickle as octets", 415, "unsupported_format", PICKLE, "application/octet-stream"),
    Row("pickle as image/png", 415, "unsupported_format", PICKLE, "image/png"),
    Row("pickle as a bulk", 415, "unsupported_format", PICKLE, "application/vnd.bentoml+pickle", "/images"),
    Row("pickle for an item", 415, "unsupported_format", PICKLE, "application/x-pickle", "/images/p", "PUT"),
    Row("pickle to a search", 415, "unsupported_format", PICKLE, "application/x-pickle", "/search"),
    Row(
        "patch that is no JSON", 415, "unsupported_format", as_json(metadata={}), "text/plain", "/images/kept", "PATCH"
    ),
    Row("a picture where a bulk was expected", 415, "unsupported_format", PICTURE, "image/png", "/images"),
]

BODIES = [
    Row("unknown field", 400, "invalid_request", as_json(images=[BASE64], colour_of_hair="red"), JSON),
    Row("unknown field in a search", 400, "invalid_request", as_json(id="kept", colour_of_hair="red"), JSON, "/search"),
    Row("depth of 100,000 lists", 400, "invalid_request", b"[" * 100_000, JSON),
    Row("depth of 100,000 objects", 400, "invalid_request", nested(100_000).encode(), JSON),
    Row("depth inside images", 400, "invalid_request", b'{"images": %s}' % (b"[" * 1000 + b"]" * 1000), JSON),
    Row("bad UTF-8", 400, "invalid_request", b'{"images": ["\xff\xfe\xff\xfe\xff\xfe\xff\xfe"]}', JSON),
    Row("UTF-16", 400, "invalid_request", '{"images": ["some text"]}'.encode("utf-16"), JSON),
    Row("half a character", 400, "invalid_request", b'{"images": ["\\ud800 some text"]}', JSON),
    Row("nothing, as JSON", 400, "invalid_request", b"", JSON),
    Row("a text for images", 400, "invalid_request", as_json(images=BASE64), JSON),
    Row("null for images", 400, "invalid_request", as_json(images=None), JSON),
    Row("no images", 400, "invalid_request", as_json(images=[]), JSON),
    Row("a long number for a picture", 400, "invalid_request", as_json(images=[12345678901]), JSON),
    Row("unknown encoding", 400, "invalid_request", as_json(images=[BASE64], encoding_format="hexadecimal"), JSON),
    Row("unknown encoding in an address", 400, "invalid_request", path="/embed?encoding_format=hexadecimal"),
    Row("base64 with a fault", 400, "invalid_request", as_json(images=["*" + BASE64]), JSON),
    Row("base64 of text", 415, "unsupported_format", as_json(images=[base64.b64encode(TEXT).decode()]), JSON),
    Row("a data URI without base64", 400, "invalid_request", as_json(images=["data:image/png," + BASE64]), JSON),
    Row("an empty data URI", 400, "empty_picture", as_json(images=["data:image/png;base64,"]), JSON),
    Row("a file's path", 400, "invalid_request", as_json(images=["/etc/passwd-and-more"]), JSON),
]

VECTOR = ["0.5"] * 128
NUMBERS = [
    Row(f"k of {k} in the address", 400, "invalid_request", path="/search?k=" + quote(k))
    for k in ("0", "-1", "1e30", '"3"', "1.5", "NaN", "", "9" * 5000)
] + [
    Row(f"k of {k} in JSON", 400, "invalid_request", b'{"id": "kept", "k": %s}' % k.encode(), JSON, "/search")
    for k in ("0", "-1", '"3"', "1.5", "NaN", "Infinity", "true", "-123456789")
] + [
    Row(f"k of {k} in JSON", 400, "invalid_query", b'{"id": "kept", "k": %s}' % k.encode(), JSON, "/search")
    for k in ("1001", "123456789", "1e30", "1e300", "9" * 30)
] + [
    Row("k of 1001 in the address", 400, "invalid_query", path="/search?k=1001"),
    Row("k of 101 for two", 400, "invalid_query", as_json(queries=[{"id": "kept"}] * 2, k=101), JSON, "/search"),
    Row("threshold of NaN", 400, "invalid_request", path="/search?threshold=NaN"),
    Row("threshold of NaN in JSON", 400, "invalid_request", b'{"id": "kept", "threshold": NaN}', JSON,
        "/search"),
    Row("threshold of 2", 400, "invalid_request", path="/search?threshold=2"),
    Row("unknown include", 400, "invalid_request", path="/search?include=originals"),
] + [
    Row(f"vector {name}", 400, code, b'{"vector": [%s]}' % ", ".join(numbers).encode(), JSON, "/search")
    for name, code, numbers in (
        ("with NaN", "invalid_request", ["NaN", *VECTOR[1:]]),
        ("with NaN at its end", "invalid_request", [*VECTOR[1:], "NaN"]),
        ("with Infinity", "invalid_request", ["Infinity", *VECTOR[1:]]),
        ("with -Infinity", "invalid_request", ["-Infinity", *VECTOR[1:]]),
        ("with 1e999", "invalid_request", ["1e999", *VECTOR[1:]]),
        ("of zeros", "invalid_query", ["0"] * 128),
        ("of -0.0", "invalid_query", ["-0.0"] * 128),
        ("too short", "invalid_query", VECTOR[1:]),
        ("too long", "invalid_query", [*VECTOR, "0.5"]),
        ("of a million", "invalid_query", ["0.5"] * 1_000_000),
        ("of nothing", "invalid_query", []),
        ("of texts", "invalid_request", ['"0.5 and some text"'] * 128),
        ("of vectors", "invalid_request", ["[0.5]"] * 128),
    )
]  # fmt: skip


def filtered(name: str, filter: str) -> list[Row]:
    """The same filter in the address and in JSON."""
    code = "invalid_query"
    body = b'{"id": "kept", "filter": %s}' % filter.encode()
    return [
        Row(f"filter {name} in the address", 400, code, path="/search?filter=" + quote(filter)),
        Row(f"filter {name} in JSON", 400, code, body, JSON, "/search"),
    ]


FILTERS = [
    *filtered("with an unknown operator", '{"label": {"$lookslike": "seventeen"}}'),
    *filtered("with an unknown word", '{"$neither": [{"label": "seventeen"}]}'),
    *filtered("of an empty object", "{}"),
    *filtered("of an empty condition", '{"label": {}}'),
    *filtered("of an empty $and", '{"$and": []}'),
    *filtered("of an empty $in", '{"label": {"$in": []}}'),
    *filtered("of 101 conditions", '{"$or": [%s]}' % ", ".join(['{"label": "7"}'] * 101)),
    *filtered("of 101 fields", json.dumps({f"label {n}": 1 for n in range(101)})),
    *filtered("with NaN", '{"year": {"$gte": NaN}}'),
    *filtered("with Infinity", '{"year": Infinity}'),
    *filtered("of a list", '{"label": ["seventeen"]}'),
    *filtered("of a huge number", '{"year": {"$lt": 1%s}}' % ("0" * 400)),
    *filtered("120 deep", '{"$not": ' * 120 + '{"label": 7}' + "}" * 120),
    Row("filter 1,000 deep in JSON", 400, "invalid_request",
        ('{"id": "kept", "filter": %s}' % nested(1000)).encode(), JSON, "/search"),
    Row("filter 1,900 deep in the address", 400, "invalid_request", path="/search?filter=" + "[" * 1900),
    Row("filter of 1001 values in JSON", 400, "invalid_query",
        as_json(id="kept", filter={"label": {"$in": ["seventeen"] * 1001}}), JSON, "/search"),
    Row("filter of 3,000 characters in the address", 400, "invalid_request",
        path="/search?filter=" + quote('{"label": "%s"}' % ("seven" * 600))),
    Row("filter with half a character", 400, "invalid_request", rb'{"id": "kept", "filter": {"a": "\ud800 seventeen"}}',
        JSON, "/search"),
    Row("filter with half a character in the address", 400, "invalid_query",
        path="/search?filter=" + quote(r'{"a": "\ud800 seventeen"}')),
    Row("filter of a text", 400, "invalid_request", as_json(id="kept", filter="label = 7"), JSON, "/search"),
    Row("filter of a text in the address", 400, "invalid_request", path="/search?filter=label+%3D+7"),
]  # fmt: skip

IDS = [
    Row(f"id {name}", 400, "invalid_request", path=f"/images/{id}", method="PUT")
    for name, id in (
        ("of NUL", "%00"),
        ("of a line's end", "%0A"),
        ("with a line's end", "some%20name%0Aforged%20line"),
        ("with an escape", "some%20name%1B%5B2J"),
        ("with C1 controls", "some%20name%C2%9B2J"),
        ("not UTF-8", "a%FFb"),
        ("of half a character", "some%20name%ED%A0%80"),
        ("of 300 bytes", "name" * 75),
        ("of 300 bytes in Hebrew", "%D7%90" * 150),
        ("of 257 bytes", "x" * 257),
        ("of nothing", ""),
    )
] + [
    Row("id like a route", 405, "method_not_allowed", path="/images/some%20name/thumbnail", method="PUT"),
    Row("id like another route", 405, "method_not_allowed", path="/images/some%20name/content", method="PUT"),
    Row("id in a search that is like a route", 400, "invalid_request", as_json(id="a/thumbnail"), JSON, "/search"),
    Row("id in a search", 404, "not_found", as_json(id="zebra number nine"), JSON, "/search"),
    Row("long id in a search", 400, "invalid_request", as_json(id="name" * 75), JSON, "/search"),
    Row("control characters in a search", 400, "invalid_request", as_json(id="some name\nand more"), JSON, "/search"),
    Row("nobody", 404, "not_found", b"", path="/images/zebra%20number%20nine", method="GET"),
    Row("nobody to remove", 404, "not_found", b"", path="/images/zebra%20number%20nine", method="DELETE"),
    Row("nobody to change", 404, "not_found", as_json(metadata={}), JSON, "/images/zebra%20number%20nine", "PATCH"),
    Row("no such page", 404, "unknown_route", b"", path="/page/..%2f..%2fapi.py", method="GET"),
    Row("no such route", 404, "unknown_route", b"", path="/some/where/else", method="GET"),
    Row("no such method", 405, "method_not_allowed", b"", path="/search", method="DELETE"),
]  # fmt: skip

METADATA = [
    Row(f"metadata {name}, {how}", 400, "invalid_request", content, type, path, method)
    for name, metadata in (
        ("over max_metadata_bytes", '{"a": "%s"}' % ("x" * 16_384)),
        ("of 33 levels", nested(33)),
        ("of 33 lists", '{"a": %s}' % ("[" * 32 + "]" * 32)),
        ("of 400 levels", nested(400)),
        ("of 600 lists", '{"a": %s}' % ("[" * 600 + "]" * 600)),
        ("of 900 lists", '{"a": %s}' % ("[" * 900 + "]" * 900)),
        ("of 5,000 lists", '{"a": %s}' % ("[" * 5000 + "]" * 5000)),
        ("with NaN", '{"some name": NaN}'),
        ("that is a list", '["some name"]'),
        ("that is cut short", '{"some name": "some'),
    )
    for how, content, type, path, method in (
        ("in a form", form(("f", PICTURE), metadata=metadata), FORM, "/images/never", "PUT"),
        ("in the address", PICTURE, "", "/images/never?metadata=" + quote(metadata, safe="{[:]}"), "PUT"),
        ("in a patch", b'{"metadata": %s}' % metadata.encode(), JSON, "/images/kept", "PATCH"),
    )
] + [
    Row("bulk metadata of an id without picture", 400, "invalid_request",
        form(("f", PICTURE), metadata='{"somebody else": {}}'), FORM, "/images"),
    Row("bulk metadata that is a list", 400, "invalid_request",
        form(("f", PICTURE), metadata='["somebody else"]'), FORM, "/images"),
    Row("bulk metadata of 100,000 levels", 400, "invalid_request",
        form(("f", PICTURE), metadata=nested(100_000)), FORM, "/images"),
    Row("bulk metadata.json that is no JSON", 400, "invalid_request",
        zipped(("f.png", PICTURE), ("metadata.json", TEXT)), ZIP, "/images"),
    Row("bulk metadata.json of bytes", 400, "invalid_request",
        zipped(("f.png", PICTURE), ("metadata.json", PICTURE)), ZIP, "/images"),
    Row("metadata of 100,000 levels", 400, "invalid_request",
        form(("f", PICTURE), metadata=nested(100_000)), FORM, "/images/never", "PUT"),
    Row("a form's field that is not known", 400, "invalid_request",
        form(("f", PICTURE), colour_of_hair="red"), FORM, "/images/never", "PUT"),
]  # fmt: skip

FINGERPRINTS = [
    Row("fingerprint on /embed", 409, "fingerprint_mismatch", path=f"/embed?fingerprint={WRONG}"),
    Row("fingerprint on /embed in JSON", 409, "fingerprint_mismatch", as_json(images=[BASE64], fingerprint=WRONG),
        JSON),
    Row("fingerprint on /search", 409, "fingerprint_mismatch", path=f"/search?fingerprint={WRONG}"),
    Row("fingerprint on /search in JSON", 409, "fingerprint_mismatch", as_json(id="kept", fingerprint=WRONG), JSON,
        "/search"),
    Row("fingerprint on PUT", 409, "fingerprint_mismatch", path=f"/images/never?fingerprint={WRONG}", method="PUT"),
    Row("fingerprint on bulk", 409, "fingerprint_mismatch", form(("never", PICTURE)), FORM,
        f"/images?fingerprint={WRONG}"),
    Row("empty fingerprint", 409, "fingerprint_mismatch", path="/embed?fingerprint="),
    Row("empty fingerprint in JSON", 409, "fingerprint_mismatch", as_json(images=[BASE64], fingerprint=""), JSON),
]  # fmt: skip

ARCHIVE = zipped(("a.png", PICTURE), ("b.png", OTHER))
ARCHIVES = [
    Row(f"zip {name}", status, code, content, ZIP, "/images")
    for name, status, code, content in (
        ("of nothing", 400, "invalid_request", b""),
        ("that is text", 400, "invalid_request", TEXT),
        ("that is a picture", 400, "invalid_request", PICTURE),
        ("cut short", 400, "invalid_request", ARCHIVE[:-40]),
        ("without its directory's end", 400, "invalid_request", ARCHIVE[:-22]),
        ("with a damaged directory", 400, "invalid_request", ARCHIVE.replace(b"PK\x01\x02", b"PK\x01\x07")),
        ("without members", 400, "invalid_request", zipped()),
        ("without pictures", 400, "invalid_request", zipped(("words.txt", TEXT), ("folder/.hidden.png", PICTURE))),
    )
]  # fmt: skip

REFUSED = [*PICTURES, *TYPES, *BODIES, *NUMBERS, *FILTERS, *IDS, *METADATA, *FINGERPRINTS, *ARCHIVES]


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.name)
def test_refused(client: TestClient, row: Row) -> None:
    assert_refused(send(client, row), row.status, row.code, sent_by(row))


def test_nothing_of_what_was_refused_is_kept(client: TestClient) -> None:
    assert_refused(client.get("/images/never"), 404, "not_found")
    assert client.get("/images/kept").json()["metadata"] == {}


def test_an_echo_would_be_found(client: TestClient) -> None:
    """The check that every row makes, on an answer that does repeat the client: an item's own."""
    answer = client.put("/images/a%20name%20that%20comes%20back", content=PICTURE)
    with pytest.raises(AssertionError):
        assert_no_echo(answer, b"a name that comes back")


# Pictures cut short ------------------------------------------------------------------------------


class Cut(NamedTuple):
    """A picture's file with something behind the picture, and where its parts end."""

    data: bytes
    begins: int  # so many bytes tell the format
    ends: int  # so many bytes hold the whole picture


def cuts() -> dict[str, Cut]:
    """One file of each format.

    What stands behind the picture: in a JPEG and a BMP any bytes, in a PNG and a GIF a comment. A WebP says at its
    beginning how long it is, so less than all of it is never whole.
    """
    picture = scene(96, 96)
    jpeg, bmp, webp = encoded(picture, "JPEG"), encoded(picture, "BMP"), encoded(picture, "WEBP")
    png, gif = encoded(picture), encoded(picture, "GIF")
    comment = b"\x21\xfe" + b"\xc8" + b"c" * 200 + b"\0"
    return {
        "JPEG": Cut(jpeg + b"j" * 300, 3, len(jpeg)),
        "PNG": Cut(png[:-12] + png_chunk(b"tEXt", b"Comment\0" + b"c" * 1000) + png[-12:], 6, len(png) - 12),
        "WEBP": Cut(webp, 12, len(webp)),
        "GIF": Cut(gif[:-1] + comment * 5 + gif[-1:], 4, len(gif) - 1),
        "BMP": Cut(bmp + b"b" * 4000, 2, len(bmp)),
    }


@pytest.mark.parametrize("point", range(20))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_cut_short(client: TestClient, format: str, point: int) -> None:
    data, begins, ends = cuts()[format]
    last = len(data) - 1
    lengths = [0, 1, begins, *(begins + (last - begins) * step // 17 for step in range(1, 18))]
    length = lengths[point]
    answer = client.post("/embed", content=data[:length])
    if not length:
        assert_refused(answer, 400, "empty_picture")
    elif length < begins:
        assert_refused(answer, 415, "unsupported_format", data[:length])
    elif length < ends or (format == "PNG" and answer.status_code == 422):
        assert_refused(answer, 422, "undecodable_picture", data[:length])
    else:
        assert np.array_equal(embedding(answer), embedding(client.post("/embed", content=data)))


# Pictures that are taken -------------------------------------------------------------------------


def embedding(answer: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    assert answer.status_code == 200, answer.text
    (row,) = answer.json()["embeddings"]
    assert abs(np.linalg.norm(row) - 1) < 1e-5
    return np.asarray(row)


def with_exif(picture: Image.Image, exif: Image.Exif | bytes) -> bytes:
    return encoded(picture, "JPEG", exif=exif, quality=95)


def transparent_palette() -> bytes:
    picture = scene().convert("P", palette=Image.Palette.ADAPTIVE)
    return encoded(picture, transparency=3)


def textual_bomb(kind: bytes = b"zTXt", head: bytes = b"Comment\0\0") -> bytes:
    """A PNG with a text that unpacks to 50 MB."""
    return PICTURE[:33] + png_chunk(kind, head + zlib.compress(b"\0" * 50_000_000, 9)) + PICTURE[33:]


TIFF_HEAD = b"Exif\0\0MM\0*\0\0\0\x08"
TAKEN = {
    "JPEG said to be a PNG": (encoded(scene(), "JPEG"), "image/png"),
    "PNG said to be a JPEG": (PICTURE, "image/jpeg"),
    "PNG said to be image/jpg": (PICTURE, "image/jpg"),
    "PNG said to be a form of curl": (PICTURE, "application/x-www-form-urlencoded"),
    "type with parameters in capitals": (PICTURE, "IMAGE/PNG; charset=utf-8"),
    "1 x 1": (encoded(scene(1, 1)), ""),
    "2 x 200": (encoded(scene(2, 200)), ""),
    "16-bit grey": (encoded(Image.fromarray(np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16))), ""),
    "1-bit": (encoded(scene().convert("1")), ""),
    "CMYK JPEG": (encoded(scene().convert("CMYK"), "JPEG"), ""),
    "YCbCr JPEG": (encoded(scene().convert("YCbCr"), "JPEG"), ""),
    "progressive JPEG": (encoded(scene(), "JPEG", progressive=True), ""),
    "LA PNG": (encoded(scene().convert("LA")), ""),
    "P PNG with transparency": (transparent_palette(), ""),
    "EXIF of no sense": (with_exif(scene(), b"Exif\0\0 this is no sense"), ""),
    "EXIF with an orientation of 42": (
        with_exif(scene(), TIFF_HEAD + b"\0\x01\x01\x12\0\x03\0\0\0\x01\0*" + b"\0" * 6),
        "",
    ),
    "EXIF with an endless loop": (
        with_exif(scene(), TIFF_HEAD + b"\0\x01\x87\x69\0\x04\0\0\0\x01" + b"\0\0\0\x08" * 2),
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_taken(client: TestClient, name: str) -> None:
    data, kind = TAKEN[name]
    embedding(client.post("/embed", content=data, headers={"content-type": kind} if kind else {}))


def test_of_ten_thousand_frames_only_the_first_is_decoded(client: TestClient) -> None:
    """The others cannot be decoded at all; whoever tried would answer 422."""
    single = encoded(scene(), "GIF")
    many = gif_of_many_frames(single, 9_999)
    with Image.open(io.BytesIO(many)) as opened, pytest.raises(Exception):  # noqa: B017  # whatever Pillow raises
        opened.seek(1)
        opened.load()
    expected, got = (embedding(client.post("/embed", content=data)) for data in (single, many))
    assert np.array_equal(got, expected)


def test_eight_orientations_of_one_picture_are_one_picture(client: TestClient) -> None:
    upright = scene(64, 64)
    stored_by = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that EXIF turns back
    expected = embedding(client.post("/embed", content=with_exif(upright, b"")))
    for orientation, transposition in stored_by.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = upright if transposition is None else upright.transpose(Image.Transpose(transposition))
        turned = embedding(client.post("/embed", content=with_exif(stored, exif)))
        assert np.abs(turned - expected).max() < 2e-3, orientation
        if transposition is not None:
            as_it_lies = embedding(client.post("/embed", content=with_exif(stored, b"")))
            assert np.abs(as_it_lies - expected).max() > 1e-2, orientation


@pytest.mark.parametrize(
    ("kind", "head"), [(b"zTXt", b"Comment\0\0"), (b"iTXt", b"Comment\0\1\0\0\0"), (b"iCCP", b"Name\0\0")]
)
def test_a_text_that_unpacks_to_much_is_not_unpacked(client: TestClient, kind: bytes, head: bytes) -> None:
    data = textual_bomb(kind, head)
    answer = client.post("/embed", content=data)
    if answer.status_code != 200:
        assert_refused(answer, 422, "undecodable_picture", data)


# What the table cannot say -----------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/embed", "/search", "/images/never"])
def test_a_body_without_length_is_stopped_at_the_limit(client: TestClient, path: str) -> None:
    method = "PUT" if "/images" in path else "POST"
    answer = client.request(method, path, content=(b"some text " for _ in range(1_100_000)))
    assert_refused(answer, 413, "too_large", b"some text " * 2)


@pytest.mark.parametrize("type", ["", "image/png", JSON, FORM])
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "identity, gzip"])
def test_compressed_bodies(client: TestClient, encoding: str, type: str) -> None:
    headers = {"content-encoding": encoding} | ({"content-type": type} if type else {})
    body = zlib.compress(PICTURE)
    assert_refused(client.post("/embed", content=body, headers=headers), 415, "unsupported_format", body)


class Trap:
    """What makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self._folder),)


@pytest.mark.parametrize("kind", ["application/x-pickle", "application/vnd.bentoml+pickle", "application/octet-stream"])
def test_a_pickle_is_not_opened(client: TestClient, kind: str, tmp_path: Path) -> None:
    trap, sprung = pickle.dumps(Trap(tmp_path / "sprung")), tmp_path / "sprung"
    for method, path in (("POST", "/embed"), ("POST", "/search"), ("PUT", "/images/never"), ("POST", "/images")):
        answer = client.request(method, path, content=trap, headers={"content-type": kind})
        assert_refused(answer, 415, "unsupported_format", trap)
    answer = client.post("/v1/embeddings", content=trap, headers={"content-type": kind})
    assert answer.status_code == 415
    assert not sprung.exists()
    pickle.loads(trap)
    assert sprung.exists()  # a trap that works


@pytest.mark.parametrize("scheme", ["http://127.0.0.1:%d/a.png", "//127.0.0.1:%d/a.png", "ftp://127.0.0.1:%d/a"])
def test_an_address_is_no_picture_and_is_not_fetched(client: TestClient, listener: socket.socket, scheme: str) -> None:
    address = scheme % listener.getsockname()[1]
    for row in (
        Row("a text in a file field", 400, "invalid_request", form(file=address), FORM),
        Row("a text in a file field", 400, "invalid_request", form(file=address), FORM, "/search"),
        Row("a text in a file field", 400, "invalid_request", form(file=address), FORM, "/images/never", "PUT"),
        Row("a text in a file field", 400, "invalid_request", form(file=address), FORM, "/images"),
        Row("a file that holds it", 415, "unsupported_format", form(("a.png", address.encode())), FORM),
        Row("a file that has its name", 415, "unsupported_format", form((address, TEXT)), FORM),
        Row("a body", 415, "unsupported_format", address.encode()),
        Row("images", 400, "invalid_request", as_json(images=[address]), JSON),
        Row("image", 400, "invalid_request", as_json(image=address), JSON, "/search"),
        Row("queries", 400, "invalid_request", as_json(queries=[{"image": address}]), JSON, "/search"),
    ):
        assert_refused(send(client, row), row.status, row.code, sent_by(row))
    answer = client.post("/v1/embeddings", json={"model": "mnist", "input": address})
    assert_openai(answer, 400, "invalid_request", address.encode())


TEXTUAL_IDS = {
    "..%2Fx": "../x",
    "..%2F..%2Fetc%2Fpasswd": "../../etc/passwd",
    "%D7%A9%D7%9C%D7%95%D7%9D": "שלום",
    "a%E2%80%AEgnp.b": "a\u202egnp.b",
    "100%25": "100%",
    "a%20b%3Fc%23d": "a b?c#d",
    "%3Cscript%3E": "<script>",
    "x" * 256: "x" * 256,
}


@pytest.mark.parametrize("address", TEXTUAL_IDS)
def test_an_id_is_text_and_nothing_else(client: TestClient, address: str) -> None:
    url = f"/images/{address}"
    assert client.put(url, content=PICTURE).status_code == 201
    assert client.get(url).json()["id"] == TEXTUAL_IDS[address]
    assert client.get(url + "/content").content == PICTURE
    assert client.delete(url).status_code == 204


def test_metadata_at_its_limits_is_taken(client: TestClient) -> None:
    for metadata in ('{"a": [%d, %d]}' % (2**70, -(10**4000)), nested(32), '{"a": "%s"}' % ("x" * (16_384 - 9))):
        answer = client.put(
            "/images/limits", content=form(("f", PICTURE), metadata=metadata), headers={"content-type": FORM}
        )
        assert answer.status_code in (200, 201)
        assert answer.json()["metadata"] == json.loads(metadata)
        found = client.post("/search?k=1000", content=PICTURE)
        assert {hit["id"]: hit["metadata"] for hit in found.json()["hits"]}["limits"] == json.loads(metadata)
    deeper = client.patch("/images/limits", json={"metadata": json.loads(nested(33))})
    assert_refused(deeper, 400, "invalid_request")
    larger = client.patch("/images/limits", json={"metadata": {"b": "x"}})
    assert_refused(larger, 400, "invalid_request")


# Many at once ------------------------------------------------------------------------------------


class Line(NamedTuple):
    """What the answer to a bulk says of one picture; a code of None: it is in the store."""

    id: str | None
    status: int
    code: str | None = None


UNDECODABLE = PICTURE[:-300]
BAD = "undecodable_picture"
BULK = {
    "form with a bad one in the middle": (
        form(("1/a.png", PICTURE), ("1/b.png", UNDECODABLE), ("1/c.png", OTHER)),
        FORM,
        [Line("1/a.png", 201), Line("1/b.png", 422, BAD), Line("1/c.png", 201)],
    ),
    "zip with a bad one in the middle": (
        zipped(("2/a.png", PICTURE), ("2/b.png", UNDECODABLE), ("2/c.png", OTHER), ("read me.txt", TEXT)),
        ZIP,
        [Line("2/a.png", 201), Line("2/b.png", 422, BAD), Line("2/c.png", 201)],
    ),
    "zip with a text, an empty and a large one": (
        zipped(("3/a.png", TEXT), ("3/b.png", b""), ("3/c.png", png_header(9_000, 9_000)), ("3/d.png", OTHER)),
        ZIP,
        [
            Line("3/a.png", 415, "unsupported_format"),
            Line("3/b.png", 400, "empty_picture"),
            Line("3/c.png", 413, "too_large"),
            Line("3/d.png", 201),
        ],
    ),
    "zip with an encrypted one": (
        encrypted(zipped(("4/a.png", PICTURE), ("4/b.png", OTHER))),
        ZIP,
        [Line("4/a.png", 415, "unsupported_format"), Line("4/b.png", 201)],
    ),
    "zip with a bomb": (
        zipped(("5/a.png", b"\0" * 10_000_001), ("5/b.png", OTHER)),
        ZIP,
        [Line("5/a.png", 413, "too_large"), Line("5/b.png", 201)],
    ),
    "zip with a bomb that says it is small": (
        understated(zipped(("6/a.png", b"\0" * 10_000_001), ("6/b.png", OTHER)), 1000),
        ZIP,
        [Line("6/a.png", 400, "invalid_request"), Line("6/b.png", 201)],
    ),
    "zip packed by lzma": (
        zipped(("7/a.png", PICTURE), packing=zipfile.ZIP_LZMA),
        ZIP,
        [Line("7/a.png", 415, "unsupported_format")],
    ),
    "zip packed by bzip2": (
        zipped(("8/a.png", PICTURE), packing=zipfile.ZIP_BZIP2),
        ZIP,
        [Line("8/a.png", 415, "unsupported_format")],
    ),
    "zip with a damaged one": (
        damaged_inside(zipped(("9/a.png", PICTURE), ("9/b.png", OTHER))),
        ZIP,
        [Line("9/a.png", 400, "invalid_request"), Line("9/b.png", 201)],
    ),
    "zip not packed, with paths that lead out of it": (
        zipped(("../10/a.png", PICTURE), ("/10/b.png", OTHER), packing=zipfile.ZIP_STORED),
        ZIP,
        [Line("../10/a.png", 201), Line("/10/b.png", 201)],
    ),
    "form with ids that are none": (
        form(("", PICTURE), ("name" * 75, PICTURE), ("some\x01name", PICTURE), ("11/a.png", OTHER)),
        FORM,
        [
            Line(None, 400, "invalid_request"),
            Line(None, 400, "invalid_request"),
            Line(None, 400, "invalid_request"),
            Line("11/a.png", 201),
        ],
    ),
    "form with metadata that is none": (
        form(
            *[(f"12/{name}.png", PICTURE) for name in "abcde"],
            metadata=json.dumps({"12/a.png": 1, "12/b.png": {"a": "x" * 16_384}, "12/e.png": {"year": 2026}})[:-1]
            + ', "12/c.png": %s, "12/d.png": {"a": %s}}' % (nested(33), "[" * 600 + "]" * 600),
        ),
        FORM,
        [
            *[Line(f"12/{name}.png", 400, "invalid_request") for name in "abcd"],
            Line("12/e.png", 201),
        ],
    ),
}


@pytest.mark.parametrize("name", BULK)
def test_bulk(client: TestClient, name: str) -> None:
    content, kind, expected = BULK[name]

    def again() -> list[Line]:
        answer = client.post("/images", content=content, headers={"content-type": kind})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/x-ndjson"
        lines = [json.loads(line) for line in answer.text.splitlines()]
        assert [line["index"] for line in lines] == list(range(len(lines)))
        return [Line(line["id"], line["status"], line.get("code")) for line in lines]

    assert again() == expected
    assert again() == [line._replace(status=200) if line.code is None else line for line in expected]
    for line in expected:
        if line.id is not None:
            stored = client.get(f"/images/{quote(line.id, safe='')}").status_code
            assert stored == (200 if line.code is None else 404), line


def test_more_than_max_bulk_images(served: Served) -> None:
    client = served(max_bulk_images="2")
    three = [(f"name number {n}.png", PICTURE) for n in range(3)]
    for content, kind in ((form(*three), FORM), (zipped(*three), ZIP)):
        answer = client.post("/images", content=content, headers={"content-type": kind})
        assert_refused(answer, 413, "too_large", content)
    assert client.get("/info").json()["count"] == 0
    answer = client.post("/images", content=zipped(*three[:2]), headers={"content-type": ZIP})
    assert [json.loads(line)["status"] for line in answer.text.splitlines()] == [201, 201]


def test_more_than_max_request_bytes(served: Served) -> None:
    client = served(max_request_bytes="20000", max_image_bytes="10000")
    for content, kind in (
        (zipped(("a.png", os.urandom(30_000))), ZIP),
        (form(*[("a.png", b"\0" * 9_000)] * 3), FORM),
        (form(("a.png", b"\0" * 11_000)), FORM),
        (zipped(*[(f"{n}.png", b"\0" * 9_000) for n in range(25)]), ZIP),  # small, and unpacks to ten times as much
        (zipped(("a.png", PICTURE), ("metadata.json", b" " * 20_001)), ZIP),
    ):
        answer = client.post("/images", content=content, headers={"content-type": kind})
        assert_refused(answer, 413, "too_large", content)
    assert_refused(client.post("/embed", json={"images": ["A" * 20_000]}), 413, "too_large", b"A" * 20_000)


# Who may -----------------------------------------------------------------------------------------

READ, WRITE = "a-key-that-may-read", "a-key-that-may-write"
KEYS = f"read:{READ},write:{WRITE}"
ASKED: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/embed", {"content": PICTURE}),
    ("POST", "/search", {"content": PICTURE}),
    ("POST", "/v1/embeddings", {"json": {"model": "mnist", "input": BASE64}}),
    ("GET", "/images", {}),
    ("GET", "/images/kept", {}),
    ("GET", "/info", {}),
    ("GET", "/docs", {}),
    ("GET", "/openapi.json", {}),
    ("GET", "/metrics", {}),
    ("PUT", "/images/kept", {"content": PICTURE}),
    ("PATCH", "/images/kept", {"json": {"metadata": {"a": 1}}}),
    ("POST", "/images", {"content": form(("b", PICTURE)), "headers": {"content-type": FORM}}),
    ("DELETE", "/images/kept", {}),
]
READING = 9


def ask(client: TestClient, method: str, path: str, authorization: str | None, options: dict[str, Any]) -> Any:
    headers = options.get("headers", {}) | ({} if authorization is None else {"authorization": authorization})
    return client.request(method, path, **options | {"headers": headers})


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer a-key-that-nobody-has",
        f"Bearer {READ[:-1]}",
        f"Bearer {READ}{READ}",
        f"Bearer {KEYS}",
        f"Bearer read:{READ}",
        f"Basic {READ}",
        f"Basic {base64.b64encode(f'user:{WRITE}'.encode()).decode()}",
        WRITE,
        "Bearer \xe9\xe8 some letters",
    ],
)
def test_no_key_that_is_known(served: Served, authorization: str | None) -> None:
    client = served(api_keys=KEYS)
    raw = None if authorization is None else authorization.encode("latin-1")
    for method, path, options in ASKED:
        answer = ask(client, method, path, raw, options)  # type: ignore[arg-type]  # bytes: not every one is ASCII
        assert answer.headers["www-authenticate"] == "Bearer"
        if path.startswith("/v1/"):
            assert_openai(answer, 401, "unauthorized", raw or b"")
        else:
            assert_refused(answer, 401, "unauthorized", raw or b"")


def test_keys_that_are_known(served: Served) -> None:
    client = served(api_keys=KEYS)
    for method, path, options in ASKED[READING:]:
        answer = ask(client, method, path, f"Bearer {READ}", options)
        assert_refused(answer, 403, "read_only_key", READ.encode())
    assert ask(client, "GET", "/info", f"Bearer {READ}", {}).json()["count"] == 0
    assert ask(client, "PUT", "/images/kept", f"bearer  {WRITE}", {"content": PICTURE}).status_code == 201
    for method, path, options in ASKED[:READING]:
        for key in (READ, WRITE):
            assert ask(client, method, path, f"Bearer {key}", options).status_code == 200, path
    for method, path, options in ASKED[READING:]:
        assert ask(client, method, path, f"Bearer {WRITE}", options).status_code in (200, 201, 204), path


def test_the_page_is_open_and_metrics_may_be(served: Served) -> None:
    client = served(api_keys=KEYS, metrics_public="true")
    for path in ("/", "/page/page.css", "/metrics"):
        assert client.get(path).status_code == 200, path
    for path in (
        "/page/../info",
        "http://testserver//info",
        "/page/%2e%2e/info",
        "/info/",
        "/metrics/",
        "/page//info",
        "/page/a%2Fb",
    ):
        assert client.get(path).status_code in (401, 404), path
    assert_refused(client.get("/info"), 401, "unauthorized")
    assert_refused(client.delete("/page/page.css"), 405, "method_not_allowed")


PREFLIGHT = {
    "origin": "https://a.example",
    "access-control-request-method": "PUT",
    "access-control-request-headers": "authorization,content-type",
}


def cors_headers(answer: Any) -> list[str]:
    return [name for name in answer.headers if name.lower().startswith("access-control")]


def test_other_origins_are_not_let_in_unless_they_are_named(served: Served) -> None:
    client = served()
    assert_refused(client.options("/images/a", headers=PREFLIGHT), 405, "method_not_allowed")
    for answer in (
        client.options("/images/a", headers=PREFLIGHT),
        client.get("/info", headers={"origin": "https://a.example"}),
        client.get("/images/nobody", headers={"origin": "https://a.example"}),
    ):
        assert not cors_headers(answer)


def test_named_origins_are_let_in(served: Served) -> None:
    client = served(api_keys=KEYS, cors_origins="https://a.example")
    asked = client.options("/images/a", headers=PREFLIGHT)  # a browser sends no key with it
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == "https://a.example"
    assert "PUT" in asked.headers["access-control-allow-methods"]
    assert asked.headers["x-request-id"]
    refused = client.get("/info", headers={"origin": "https://a.example"})
    assert_refused(refused, 401, "unauthorized")
    assert refused.headers["access-control-allow-origin"] == "https://a.example"  # or the page could not read why
    for origin in ("https://b.example", "https://a.example.b.example", "http://a.example", "null"):
        elsewhere = client.options("/images/a", headers=PREFLIGHT | {"origin": origin})
        assert elsewhere.status_code == 400
        assert "access-control-allow-origin" not in elsewhere.headers, origin
        answer = client.get("/info", headers={"origin": origin, "authorization": f"Bearer {READ}"})
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in answer.headers, origin


# OpenAI's shape ----------------------------------------------------------------------------------


def assert_openai(answer: Any, status: int, code: str, sent: bytes = b"") -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert_no_echo(answer, sent)


OPENAI = [
    Row("address", 400, "invalid_request", as_json(model="mnist", input="https://a.example/some/picture.png")),
    Row("unknown model", 404, "model_not_found", as_json(model="text-embedding-3-small", input=BASE64)),
    Row("wrong dimensions", 400, "invalid_request", as_json(model="mnist", input=BASE64, dimensions=7)),
    Row("huge dimensions", 400, "invalid_request", as_json(model="mnist", input=BASE64, dimensions=10**30)),
    Row("33 pictures", 413, "too_large", as_json(model="mnist", input=[BASE64] * 33)),
    Row("no picture", 400, "invalid_request", as_json(model="mnist", input=[])),
    Row("an empty text", 400, "empty_picture", as_json(model="mnist", input="")),
    Row("a sentence", 400, "invalid_request", as_json(model="mnist", input="The food was delicious")),
    Row("tokens", 400, "invalid_request", as_json(model="mnist", input=[1, 2, 3])),
    Row("no model", 400, "invalid_request", as_json(input=BASE64)),
    Row("unknown encoding", 400, "invalid_request", as_json(model="mnist", input=BASE64, encoding_format="hexadecim")),
    Row("unknown field", 400, "invalid_request", as_json(model="mnist", input=BASE64, colour_of_hair="red")),
    Row("text as a picture", 415, "unsupported_format", as_json(model="mnist", input=base64.b64encode(TEXT).decode())),
    Row("cut short", 422, BAD, as_json(model="mnist", input=base64.b64encode(UNDECODABLE).decode())),
    Row("no JSON", 400, "invalid_request", b"this is no JSON"),
    Row("deep", 400, "invalid_request", b"[" * 100_000),
    Row("a picture", 415, "unsupported_format", PICTURE, "image/png"),
    Row("unknown route", 404, "unknown_route", b"{}", path="/v1/chat/completions"),
    Row("wrong method", 405, "method_not_allowed", b"", method="GET"),
]  # fmt: skip


@pytest.mark.parametrize("row", OPENAI, ids=lambda row: row.name)
def test_refused_in_openais_shape(client: TestClient, row: Row) -> None:
    path = "/v1/embeddings" if row.path == "/embed" else row.path
    answer = send(client, row._replace(path=path, type=row.type or JSON))
    assert_openai(answer, row.status, row.code, row.content)


def test_openais_shape(client: TestClient) -> None:
    expected = [embedding(client.post("/embed", content=data)) for data in (PICTURE, OTHER)]
    uris = [f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in (PICTURE, OTHER)]
    asked = {"model": "mnist", "input": uris, "dimensions": len(expected[0]), "user": "somebody"}
    for form in ("float", "base64"):
        answer = client.post("/v1/embeddings", json=asked | {"encoding_format": form})
        assert answer.status_code == 200, answer.text
        content = answer.json()
        assert set(content) == {"object", "data", "model", "usage"}
        assert (content["object"], content["model"]) == ("list", "mnist")
        assert content["usage"] == {"prompt_tokens": 0, "total_tokens": 0}
        assert [(row["object"], row["index"]) for row in content["data"]] == [("embedding", 0), ("embedding", 1)]
        for row, numbers in zip(content["data"], expected, strict=True):
            got = row["embedding"]
            got = np.frombuffer(base64.b64decode(got), "<f4") if form == "base64" else np.asarray(got)
            assert np.abs(got - numbers).max() < 1e-6
    single = client.post("/v1/embeddings", json={"model": "mnist", "input": uris[0]}).json()
    assert np.abs(np.asarray(single["data"][0]["embedding"]) - expected[0]).max() < 1e-6


# The real process --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a service runs in processes of its own."""
    with serving(tmp_path_factory.mktemp("process"), max_buffered_bytes="50000000") as found:
        yield found


def connect(address: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=2)


def raw(address: str, request: bytes) -> bytes:
    """Send bytes as they are; return what comes back until the other side ends or is silent for two seconds."""
    with connect(address) as connection:
        received = b""
        try:
            connection.sendall(request)
            while part := connection.recv(65536):
                received += part
        except (TimeoutError, ConnectionError):
            pass
        return received


LENGTH = b"Content-Length: %d\r\n" % len(PICTURE)
PARSED = {
    "two lengths": LENGTH + b"Content-Length: 5\r\n",
    "two lengths, the other way round": b"Content-Length: 5\r\n" + LENGTH,
    "a length and chunks": LENGTH + b"Transfer-Encoding: chunked\r\n",
    "a negative length": b"Content-Length: -5\r\n",
    "a length that is no number": b"Content-Length: five zebras\r\n",
    "a header of 100 KB": LENGTH + b"X-Some-Name: " + b"five zebras " * 9_000 + b"\r\n",
    "a header without a name": LENGTH + b": five zebras\r\n",
    "a header with NUL": LENGTH + b"X-Some-Name: five\0zebras\r\n",
}


@pytest.mark.parametrize("name", PARSED)
def test_what_the_http_parser_refuses(address: str, name: str) -> None:
    """A picture that is taken, but for one fault in what is said about it. The answer is the parser's own, plain."""
    request = b"POST /embed HTTP/1.1\r\nHost: a\r\nConnection: close\r\n%s\r\n" + PICTURE
    assert raw(address, request.replace(b"%s", LENGTH)).startswith(b"HTTP/1.1 200 ")
    answer = raw(address, request.replace(b"%s", PARSED[name]))
    assert re.match(rb"HTTP/1\.1 4\d\d ", answer), answer[:200]
    assert b"zebras" not in answer
    assert httpx2.get(address + "/info").status_code == 200


def test_a_body_without_length_is_stopped_while_it_comes_in(address: str) -> None:
    """The rest is taken and dropped, so that the client hears the answer."""
    answer = httpx2.post(address + "/embed", content=(b"some text " * 10_000 for _ in range(200)))
    assert_refused(answer, 413, "too_large", b"some text " * 2)
    assert answer.headers["connection"] == "close"


def memory() -> int:
    """Bytes that the processes of the service hold: the only children of this one."""
    return sum(one.memory_info().rss for one in psutil.Process().children(recursive=True))


def test_clients_that_leave_in_mid_upload_leave_nothing_behind(address: str) -> None:
    assert httpx2.get(address + "/info").status_code == 200
    before = memory()
    assert before > 50_000_000
    for _ in range(20):
        with connect(address) as connection:
            connection.sendall(b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: 9000000\r\n\r\n")
            connection.sendall(b"\0" * 8_000_000)
        assert httpx2.get(address + "/info", timeout=1).status_code == 200
    assert memory() - before < 30_000_000
    # Nor are they counted any more: with a fourth of them there would be no room for another body.
    assert httpx2.post(address + "/embed", content=PICTURE).status_code == 200
