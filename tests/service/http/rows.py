"""Refused requests, the parts they are made of, and the frame that all refusals share."""

import base64
import io
import json
import re
import zipfile
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

import numpy as np
from starlette.testclient import TestClient

from tests.conftest import encoded, scene

JSON = "application/json"
FORM = "multipart/form-data; boundary=row"
ZIP = "application/zip"
PICTURE = encoded(scene())
OTHER = encoded(scene(seed=1))
BASE64 = base64.b64encode(PICTURE).decode()
TEXT = b"zebras quickly jump over lazy wizards and their boxes"
# No encoder has this fingerprint.
WRONG = "f0e1d2c3" * 8
# An answer may contain these words of the service although the client sent them, too.
OUR_WORDS = re.compile(
    rb"metadata|dimensions|queries|templates|encoding_format|fingerprint|threshold|/thumbnail|/content|data:image/|base64|127\.0\.0\.1"
)
# So many of the client's bytes in a row count as an echo.
RUN = 8  # bytes


class Row(NamedTuple):
    """A request and the refusal that must come back."""

    name: str
    status: int
    code: str
    content: bytes = PICTURE
    type: str = ""
    path: str = "/embed"
    method: str = "POST"


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


def as_json(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def nested(levels: int, inner: str = "1") -> str:
    return '{"a": ' * levels + inner + "}" * levels


def embedding(answer: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    assert answer.status_code == 200, answer.text
    (row,) = answer.json()["embeddings"]
    assert abs(np.linalg.norm(row) - 1) < 1e-5
    return np.asarray(row)


def assert_openai(answer: Any, status: int, code: str, sent: bytes = b"") -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert_no_echo(answer, sent)


UNDECODABLE = PICTURE[:-300]
BAD = "undecodable_picture"
