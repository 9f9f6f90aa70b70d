"""API keys: who may read, who may also write."""

import hashlib
import hmac
from pathlib import Path

from service.errors import Forbidden, InvalidRequest, Unauthorized
from service.settings import Settings

_LEAST_LENGTH = 16
_RIGHTS = {"read": False, "write": True}


class Keys:
    """The keys of a service, kept as digests. Empty: no key is asked for."""

    def __init__(self, lines: list[str]) -> None:
        """Read keys, each as read:KEY or write:KEY.

        Raises:
            InvalidRequest: a line of another form. Its text is not repeated, it may hold a key.
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
        """Return where the header `Authorization: Bearer KEY` gives the right, or no key is asked for.

        Every key is compared, and in constant time, so that the time taken tells nothing of any.

        Raises:
            Unauthorized, Forbidden.
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
        InvalidRequest: a key of another form, a file that cannot be read, or a file without any key.
    """
    lines = [line for line in settings.api_keys.get_secret_value().split(",") if line.strip()]
    if settings.api_keys_file is not None:
        lines += _read_file(settings.api_keys_file)
    return Keys(lines)


def _read_file(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path}: API keys cannot be read from there: {error}") from error
    if not lines:
        raise InvalidRequest(f"{path}: holds no API key; expected a line such as read:KEY or write:KEY")
    return lines


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
