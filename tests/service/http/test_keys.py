"""API keys: their sources and their permissions."""

from pathlib import Path

import pytest
from pydantic import SecretStr

from service.errors import Forbidden, InvalidRequest, Unauthorized
from service.http.keys import Keys, read_keys
from service.settings import Settings

READ, WRITE = "reading-is-allowed", "writing-is-allowed"


def test_rights() -> None:
    keys = Keys([f"read:{READ}", f"write: {WRITE} "])
    for key in (READ, WRITE):
        keys.check(f"Bearer {key}", writes=False)
    keys.check(f"bearer  {WRITE}", writes=True)
    with pytest.raises(Forbidden):
        keys.check(f"Bearer {READ}", writes=True)
    for header in ("", READ, f"Basic {READ}", f"Bearer {READ}x", "Bearer", f"Bearer {READ} {READ}", "Bearer é"):
        with pytest.raises(Unauthorized):
            keys.check(header, writes=False)


def test_without_keys_nobody_is_asked() -> None:
    Keys([]).check("", writes=True)


def test_keys_come_from_the_environment_and_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# who reads\nread:{READ}\n\n")
    keys = read_keys(Settings(api_keys=SecretStr(f"write:{WRITE},"), api_keys_file=file))
    assert len(keys) == 2
    keys.check(f"Bearer {READ}", writes=False)
    keys.check(f"Bearer {WRITE}", writes=True)
    assert WRITE not in repr(Settings(api_keys=SecretStr(f"write:{WRITE}")))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_file_as_windows_writes_it(encoding: str, end: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    file.write_bytes((mark + f"read:{READ}{end}# who writes: Zoë{end}write:{WRITE}{end}").encode(encoding))
    keys = read_keys(Settings(api_keys_file=file))
    assert len(keys) == 2
    keys.check(f"Bearer {READ}", writes=False)
    keys.check(f"Bearer {WRITE}", writes=True)


@pytest.mark.parametrize(
    "line", ["s3cret-s3cret-s3cret", "admin:s3cret-s3cret-s3cret", "read:s3cret", "write:s3cret " * 3]
)
def test_keys_that_are_none_are_refused_and_not_repeated(line: str) -> None:
    with pytest.raises(InvalidRequest, match="API key 1: expected") as refused:
        Keys([line])
    assert "s3cret" not in str(refused.value)


def test_files_without_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_keys(Settings(api_keys_file=tmp_path / "none"))
    (tmp_path / "empty").write_text("# nobody\n")
    with pytest.raises(InvalidRequest, match="holds no API key"):
        read_keys(Settings(api_keys_file=tmp_path / "empty"))
