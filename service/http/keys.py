"""API keys: some may read, some may also write."""

import codecs
import hashlib
import hmac
from pathlib import Path

from service.errors import Forbidden, InvalidRequest, Unauthorized
from service.settings import Settings

_LEAST_LENGTH = 16
_RIGHTS = {"read": False, "write": True}


class Keys:
    """The API keys of a service, kept as digests. Without any key, every request is allowed."""

    def __init__(self, lines: list[str]) -> None:
        """Parse keys, each as read:KEY or write:KEY.

        Raises:
            InvalidRequest: a line of another form. The message does not repeat the line, which may hold a key.
        """
        self._keys: list[tuple[bytes, bool]] = []
        for number, line in enumerate(lines, 1):
            right, colon, key = line.partition(":")
            key = key.strip()
            if not colon or right.strip() not in _RIGHTS or not key.isascii() or not key.isprintable():
                raise InvalidRequest(f"API key {number}: expected read:KEY or write:KEY")
            if len(key) < _LEAST_LENGTH or " " in key:
                raise InvalidRequest(f"API key {number}: expected {_LEAST_LENGTH} characters or more, no spaces")
            self._keys.append((_digest(key.encode()), _RIGHTS[right.strip()]))

    def __len__(self) -> int:
        return len(self._keys)

    def check(self, authorization: str, writes: bool) -> None:
        """Check the header `Authorization: Bearer KEY`.

        Every key is compared, each in constant time, so that the duration reveals nothing about a key.

        Raises:
            Unauthorized: no known key.
            Forbidden: a key that may read only, for a request that writes.
        """
        if not self._keys:
            return
        scheme, _, given = authorization.partition(" ")
        digest = _digest(given.strip().encode("latin-1"))
        known = may_write = False
        for key, right in self._keys:
            same = hmac.compare_digest(key, digest)
            known |= same
            may_write |= same and right
        if not known or scheme.lower() != "bearer":
            raise Unauthorized("expected an API key in the header Authorization: Bearer KEY")
        if writes and not may_write:
            raise Forbidden("this API key may read only; expected one that may write")


def read_keys(settings: Settings) -> Keys:
    """Return the keys of the settings.

    Raises:
        InvalidRequest: a malformed key, an unreadable file, or a file without a key.
    """
    lines = [line for line in settings.api_keys.get_secret_value().split(",") if line.strip()]
    if settings.api_keys_file is not None:
        lines += _read_file(settings.api_keys_file)
    return Keys(lines)


def _read_file(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
        # Windows marks UTF-8 with a BOM, and PowerShell writes UTF-16.
        text = data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path}: API keys cannot be read from there: {error}") from error
    if not lines:
        raise InvalidRequest(f"{path}: holds no API key; expected a line such as read:KEY or write:KEY")
    return lines


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
