# ruff: noqa: E501
"""Each guard is taken out of a copy of the service, one at a time; each time a test must notice."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT


class Removal(NamedTuple):
    """What is taken out: in which file, which text, what stands there then, and which tests must go red."""

    file: str
    guard: str
    instead: str
    tests: str = "http/refusals http/pictures http/bodies http/items http/uploads http/access http/openai http/process"


REMOVALS = [
    # images.py: what a picture may be
    Removal("encoding/images", "if len(data) > limits.max_image_bytes:", "if False:", "encoding/images"),
    Removal("encoding/images", "if max(width, height) > limits.max_side:", "if False:", "encoding/images"),
    Removal("encoding/images", "if width * height > limits.max_pixels:", "if False:"),
    Removal("encoding/images", "if max(width, height) > limits.max_aspect * min(width, height):", "if False:"),
    Removal("encoding/images", '> _MOST_SCANS:', '> 10**9:', "encoding/images"),
    Removal("encoding/images", '> _MOST_MARKS:', '> 10**9:', "encoding/images"),
    Removal("encoding/images", 'raise TooLarge(f"the picture has more than {_MOST_CHUNKS}', 'print(f"{_MOST_CHUNKS}', "encoding/images"),
    Removal("encoding/images", 'if picture.format == "BMP" and picture', "if False and picture", "encoding/images"),
    Removal("encoding/images", ", formats=FORMATS)", ")"),
    # bodies.py: what a body may be
    Removal("http/bodies", "if declared.isdecimal() and int(declared) > limit:", "if False:", "http/guard"),
    Removal("http/bodies", "        if received > limit:", "        if False:"),
    Removal("http/bodies", "if len(self._form.files) == self._most_files:", "if False:"),
    Removal("http/bodies", "len(self._content) > self._most_file_bytes", "False"),
    Removal("http/bodies", "if len(self._content) > _MOST_TEXT_BYTES:", "if False:", "http/guard"),
    Removal("http/bodies", "if len(text) > most_bytes * 4 // 3 + 200:", "if False:", "http/guard"),
    Removal("http/bodies", 'elif self._name == "file" or b"filename" in options:', "elif False:", "http/guard"),
    Removal("http/bodies", "if not self._ended:", "if False:", "http/guard"),
    Removal("http/bodies", 'not in ("identity", "")', "in ()"),
    Removal("http/bodies", 'if kind not in _RAW and not kind.startswith("image/"):', "if False:"),
    Removal("http/bodies", "b64decode(text, validate=True)", "b64decode(text + '==')"),
    Removal("http/bodies", "elif len(self._form.texts) == _MOST_FIELDS:", "elif False:", "http/guard"),
    # guard.py, keys.py: who comes in, and how
    Removal("http/guard", "            _check_path(scope)\n", ""),
    Removal("http/guard", '> _MOST_HEADER_BYTES', "> 10**9"),
    Removal("http/guard", "if not (_OPEN.fullmatch(path)", "if not (True or _OPEN.fullmatch(path)"),
    Removal("http/guard", "timeout_at(self._deadline):\n  ", "timeout_at(self._deadline + 9):\n  ", "http/guard"),
    Removal("http/guard", "drained <= self._most_drained", "True", "http/guard"),
    Removal("http/guard", "await self._drain()", "pass", "http/guard"),
    Removal("http/guard", 'headers["Connection"] = "close"', "pass", "http/guard"),
    Removal("http/guard", "if self._buffered > self._settings.max_buffered_bytes:", "if False:", "http/guard"),
    Removal("http/guard", "self._buffered -= exchange.received", "pass", "http/guard"),
    Removal("http/guard", "if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex", "or uuid.uuid4().hex", "http/guard"),
    Removal("http/guard", 'scope["state"].get("route", "other")', 'scope["path"]', "http/guard"),
    Removal("http/guard", 'headers["X-Content-Type-Options"] = "nosniff"', "pass", "http/guard"),
    Removal("http/keys", "if not known or", "if"),
    Removal("http/keys", "if writes and not may_write:", "if False:"),
    Removal("http/problems", 'headers["WWW-Authenticate"] = "Bearer"', "pass"),
    # slots.py: how much work
    Removal("http/slots", "if self._count >= self._max_waiting:", "if False:", "http/slots"),
    Removal("http/slots", "asyncio.timeout(timeout_s)", "asyncio.timeout(None)", "http/slots"),
    Removal("http/slots", "self._timeout.reschedule(0)", "pass", "http/slots"),
    Removal("http/slots", "                future.cancel()", "                pass", "http/slots"),
    # batcher.py, encoder.py: whom it harms
    Removal("encoding/batcher", "if job[1].set_running_or_notify_cancel():", "if True:", "encoding/batcher"),
    Removal("encoding/batcher", "if len(batch) == 1 or (no_memory and halved):", "if True:", "encoding/batcher"),
    Removal("encoding/batcher", "(no_memory and halved)", "False", "encoding/batcher"),
    Removal("encoding/batcher", "most = max(1, len(batch) // 2)", "pass", "encoding/batcher"),
    Removal("encoding/encoder", "_alike(embedding, card.canary, _LEAST_KNOWN_COSINE)", "True", "encoding/encoder"),
    Removal("encoding/encoder", "_alike(embedding, self._known, _LEAST_OWN_COSINE)", "True", "encoding/encoder"),
    # schemas.py, gallery.py, store/filters.py: what a request may say
    Removal("http/schemas", 'extra="forbid"', 'extra="ignore"'),
    Removal("http/schemas", "elif part in _FIELDS:", "else:"),
    Removal("http/schemas", "abs(value) < _SHOWN_BELOW", "True"),
    Removal("gallery", "if not 1 <= k <= most:", "if False:"),
    Removal("queries", "if vector.shape != (dimension,):", "if False:"),
    Removal("queries", "if not largest:", "if False:", "http/routes"),
    Removal("gallery", "if size > self.settings.max_metadata_bytes:", "if False:"),
    Removal("gallery", "if _depth(metadata) > _MOST_DEPTH:", "if False:"),
    Removal("gallery", "allow_nan=False", "allow_nan=True", "http/routes"),
    Removal("gallery", "if not 1 <= len(id.encode()) <= most_bytes:", "if False:"),
    Removal("gallery", 'category(character) in ("Cc", "Cs")', "category(character) in ()", "gallery"),
    Removal("gallery", 'id = unicodedata.normalize("NFC", id)', "pass", "gallery"),
    Removal("store/filters", "    if budget[0] < 0:\n        raise", "    if False:\n        raise", "store/filters"),
    Removal("store/filters", "1 <= len(wanted) <= _MOST_VALUES", "True", "store/filters"),
    # store/: what is believed, and when
    Removal("store/snapshot", "if file.read() != _number(checksum):", "if False:", "store/snapshot"),
    Removal("store/snapshot", "if size != len(start)", "if False and size != len(start)", "store/snapshot"),
    Removal("store/embedded", 'if facts.get("fingerprint") != self._card.fingerprint:', "if False:", "store/snapshot"),
    Removal("store/embedded", "if not np.array_equal(index.keys(), keys):", "if False:", "store/snapshot"),
    Removal("store/embedded", "if not all(index.holds(*chunk)", "if not all(True", "store/snapshot"),
    Removal("store/embedded", "        checked(np.stack(", "        print(np.stack(", "store/embedded"),
    Removal("store/commits", "                raise InvalidStore(self._refusal)", "                pass", "store/commits"),
    Removal("store/commits", "self.refuse(f", "str(f", "store/commits"),
    Removal("store/catalog", "zlib.crc32(blob) != checksum or", "", "store/embedded"),
    Removal("store/layout", "fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", "store/embedded"),
    # api.py, openai.py, bulk.py
    Removal("http/routes/state", "if fingerprint is not None and fingerprint != gallery.card.fingerprint:", "if False:"),
    Removal("http/routes/search", "if len(queries) > settings.max_queries:", "if False:"),
    Removal("http/problems", "app.add_exception_handler(ClientDisconnect, _on_disconnect)", "pass", "http/guard"),
    Removal("http/bodies", "if images > settings.max_images:", "if False:"),
    Removal("http/uploads", "if len(data) > most:", "if False:"),
    Removal("http/uploads", "if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):", "if False:"),
    Removal("http/uploads", "if member.flag_bits & 1:", "if False:"),
    Removal("http/uploads", "if len(self._members) > settings.max_bulk_images:", "if False:"),
    Removal("http/uploads", 'if content.count(b"PK\\x01\\x02") > 2 * settings.max_bulk_images:', "if False:", "http/guard"),
    Removal("http/uploads", "> _MOST_UNPACKED * settings.max_request_bytes:", "> 10**15:", "http/guard"),
]  # fmt: skip


@pytest.mark.proof
@pytest.mark.parametrize("removal", REMOVALS, ids=lambda removal: f"{removal.file}: {removal.guard.strip()[:60]}")
def test_a_guard_that_is_gone_is_noticed(removal: Removal, tmp_path: Path) -> None:
    for folder in ("service", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("models", "lookalike.py", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    source = tmp_path / "service" / f"{removal.file}.py"
    text = source.read_text()
    assert text.count(removal.guard) >= 1, "the guard is not there: has it moved?"
    source.write_text(text.replace(removal.guard, removal.instead))
    tests = [
        f"tests/service{folder}/test_{name}.py"
        for folder, _, name in (f"/{one}".rpartition("/") for one in removal.tests.split())
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *tests],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, f"nobody noticed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert "failed" in done.stdout, done.stdout[-2000:]
