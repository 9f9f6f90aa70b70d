"""Refused requests, one a row, with the exact status and code."""

import base64
import json
import pickle
from pathlib import Path
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient

from tests.conftest import encoded, scene
from tests.service.encoding.test_images import png_header
from tests.service.http.rows import (
    BASE64,
    FORM,
    JSON,
    OTHER,
    PICTURE,
    TEXT,
    WRONG,
    ZIP,
    Row,
    as_json,
    assert_no_echo,
    assert_refused,
    form,
    nested,
    send,
    sent_by,
    zipped,
)

PICKLE = pickle.dumps({"a": Path("somewhere"), "b": 1})
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 200
SVG = b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><script>alert('svg')</script></svg>"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n/showpage { (%pipe%id) (r) file } def\n%%EOF\n"

PICTURES = [
    Row("nothing", 400, "empty_picture", b""),
    Row("nothing, as image/png", 400, "empty_picture", b"", "image/png"),
    Row("text", 415, "unsupported_format", TEXT),
    Row("SVG", 415, "unsupported_format", SVG, "image/svg+xml"),
    Row("cut HEIC", 422, "undecodable_picture", HEIC, "image/heic"),
    Row("EPS", 415, "unsupported_format", EPS, "image/x-eps"),
    Row("film", 415, "unsupported_format", b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + bytes(200), "video/mp4"),
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
    *filtered("of a negated list", '{"$not": [{}]}'),
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
    Row("id that no address can name", 400, "invalid_request", as_json(id=".."), JSON, "/search"),
    Row("id in a search that is like a route", 404, "not_found", as_json(id="a/thumbnail"), JSON, "/search"),
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
    """The check for echoes fails on an answer that does repeat the client's bytes: an item."""
    answer = client.put("/images/a%20name%20that%20comes%20back", content=PICTURE)
    with pytest.raises(AssertionError):
        assert_no_echo(answer, b"a name that comes back")
