"""Files of an encoder that others trained: in a repository on Hugging Face's hub, or in a folder of the same layout.

huggingface_hub fetches, with its cache, token, offline switch and HF_ENDPOINT. Files are read as data alone: no code
of a repository is run, and nothing is unpickled.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from service.errors import InvalidModel, InvalidOutput, InvalidRequest

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

HUB = "hf:"
_NAME = re.compile(r"hf:(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)


class Files(Protocol):
    """Files by their paths in a repository.

    Attributes:
        what: names the repository in messages.
        origin: names it for good in a card, with the commit.
        names: the paths, with / between folders.
    """

    @property
    def what(self) -> str: ...
    @property
    def origin(self) -> str: ...
    @property
    def names(self) -> tuple[str, ...]: ...

    def read(self, name: str) -> bytes:
        """Return a file's content. Raises InvalidModel if it cannot be had."""


class LocalFiles(NamedTuple):
    """The files in a folder and in its folders."""

    folder: Path
    what: str
    origin: str
    names: tuple[str, ...]

    def read(self, name: str) -> bytes:
        """Return a file's content. Raises InvalidModel."""
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise InvalidModel(f"{self.what}: {name} cannot be read: {error.strerror}") from error


class HubFiles(NamedTuple):
    """The files of a repository at one commit; `read` fetches a file into huggingface_hub's cache."""

    repository: str
    commit: str
    what: str
    names: tuple[str, ...]

    @property
    def origin(self) -> str:
        return f"{HUB}{self.repository}@{self.commit}"

    def read(self, name: str) -> bytes:
        """Return a file's content. Raises InvalidModel, and InvalidOutput if the cache's disk is full."""
        from huggingface_hub import hf_hub_download

        with _in_a_sentence(self.what, self.repository):
            return Path(hf_hub_download(self.repository, name, revision=self.commit)).read_bytes()


def open_folder(folder: Path) -> LocalFiles:
    """Return the files of a folder, and of the folders in it."""
    found = [path for path in (*folder.glob("*"), *folder.glob("*/*")) if path.is_file()]
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    return LocalFiles(folder, str(folder), folder.resolve().name, tuple(names))


def open_hub(what: str) -> HubFiles:
    """Return the files of hf:ORG/NAME[@REVISION], whose branch or tag is resolved to a commit now.

    Where the hub cannot be reached, they are those that huggingface_hub's cache has.

    Raises:
        InvalidRequest: it is not of that form.
        InvalidModel: no such repository or revision, one that is closed to this token, or a hub that cannot be reached
            and a cache without the repository.
    """
    match = _NAME.fullmatch(what)
    if match is None:
        raise InvalidRequest(f"{what}: expected {HUB}ORG/NAME, with @REVISION behind it if you like")
    # Imported late: it takes a second, and reads the environment.
    from huggingface_hub import HfApi, errors, snapshot_download

    name, api = match["name"], HfApi()
    with _in_a_sentence(what, name):
        commit = api.resolve_revision(name, revision=match["revision"]).resolved
        try:
            return HubFiles(name, commit, what, tuple(sorted(api.list_repo_files(name, revision=commit))))
        except errors.HfHubHTTPError:
            raise
        # The HTTP client that its last class is of differs between versions.
        except (errors.OfflineModeIsEnabled, errors.HTTPError):  # type: ignore[attr-defined]
            try:
                folder = snapshot_download(name, revision=commit, local_files_only=True)
            except errors.IncompleteSnapshotError as error:
                folder = error.snapshot_path
    return HubFiles(name, commit, what, open_folder(Path(folder)).names)


@contextmanager
def _in_a_sentence(what: str, repository: str) -> Iterator[None]:
    """Raise errors of huggingface_hub as ours."""
    from huggingface_hub import errors
    from huggingface_hub.constants import ENDPOINT

    try:
        yield
    except errors.GatedRepoError as error:
        raise InvalidModel(
            f"{what}: is gated: accept its terms at {ENDPOINT}/{repository}, then set HF_TOKEN to a token of yours"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InvalidModel(f"{what}: the repository has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise InvalidModel(
            f"{what}: {ENDPOINT} has no such repository, or shows it only to those who may read it (HF_TOKEN)"
        ) from error
    except errors.HfHubHTTPError as error:
        raise InvalidModel(f"{what}: {ENDPOINT} answers {_status(error)}") from error
    except (errors.OfflineModeIsEnabled, errors.RevisionResolutionError, errors.LocalEntryNotFoundError) as error:
        from huggingface_hub.constants import HF_HUB_OFFLINE

        why = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else f"{ENDPOINT} cannot be reached"
        raise InvalidModel(f"{what}: {why}, and the cache has not all that is needed") from error
    except errors.HFValidationError as error:
        raise InvalidRequest(f"{what}: {error}") from error
    except errors.HTTPError as error:  # type: ignore[attr-defined]
        raise InvalidModel(f"{what}: {ENDPOINT} cannot be reached: {error}") from error
    except OSError as error:
        full = "; make room, or set HF_HOME to a folder with room" if error.errno == errno.ENOSPC else ""
        raise InvalidOutput(f"{what}: cannot be downloaded: {error.strerror or error}{full}") from error


def _status(error: "HfHubHTTPError") -> str:
    status = error.response.status_code
    closed = ": the token in use may not read it (HF_TOKEN)" if status in (401, 403) else ""
    return f"{status}{closed}"
