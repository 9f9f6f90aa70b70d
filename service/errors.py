"""What can go wrong, as a map of the data flow; each class is an arrow or what stands at its end.

    source ─read─▶ bytes ─decode─▶ picture ─resize─▶ pixels ─encode─▶ embedding ─search─▶ hits
      InvalidSource  │                │                  NoEmbedding     │          InvalidQuery
                     ├ EmptyPicture   ├ UndecodablePicture               │          ItemNotFound
                     ├ TooLarge       └ TooLarge (pixels, sides)         ▼
                     └ UnsupportedFormat                        store: InvalidStore, StoreMismatch

Around them: InvalidRequest (what a request or a flag says), InvalidModel (models/NAME), OutOfMemory, InvalidOutput
(--out); over HTTP also Unauthorized, Forbidden, SlowBody, Busy, Overloaded, NoStore and TimedOut.
`status` is what HTTP answers, `code` the word a program reads. At the command line every one of them
is one sentence on stderr and exit code 2.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class LookalikeError(Exception):
    """Base of every error that a user may cause; str() is one sentence for that user.

    Attributes:
        parts: where the error is about members of a list, each one's place there and what is wrong with it.
    """

    status = 500
    code = "internal"

    def __init__(self, message: str, parts: "Sequence[tuple[int, LookalikeError]]" = ()) -> None:
        super().__init__(message)
        self.parts = tuple(parts)


class InvalidRequest(LookalikeError):
    """A parameter or a body is malformed."""

    status = 400
    code = "invalid_request"


class EmptyPicture(InvalidRequest):
    """There are no bytes where a picture was expected."""

    code = "empty_picture"


class TooLarge(LookalikeError):
    """Bytes, pixels, a side or an aspect ratio above the limit."""

    status = 413
    code = "too_large"


class UnsupportedFormat(LookalikeError):
    """The bytes are in no picture format that we take, or the body in no form that we read."""

    status = 415
    code = "unsupported_format"


class UndecodablePicture(LookalikeError):
    """The bytes begin like a picture and then cannot be decoded."""

    status = 422
    code = "undecodable_picture"


class NoEmbedding(LookalikeError):
    """The encoder gives these pixels no direction: its output is zero or not finite."""

    status = 422
    code = "no_embedding"


class InvalidQuery(InvalidRequest):
    """A search that cannot be: wrong dimension, not finite, k out of range."""

    code = "invalid_query"


class ItemNotFound(LookalikeError):
    """No item, or no stored bytes of it, under this id."""

    status = 404
    code = "not_found"


class InvalidSource(LookalikeError):
    """A SOURCE that does not exist, cannot be read or holds no picture."""

    code = "invalid_source"


class InvalidModel(LookalikeError):
    """A model folder that is missing, damaged or outside the contract."""

    code = "invalid_model"


class InvalidStore(LookalikeError):
    """A store folder that is damaged, cannot be written, is in use by another process or is not a store."""

    status = 503
    code = "invalid_store"


class StoreMismatch(LookalikeError):
    """A store whose embeddings were made by another encoder."""

    status = 409
    code = "store_mismatch"


class NoStore(LookalikeError):
    """A service without a store is asked for something that only a store has."""

    status = 404
    code = "no_store"


class OutOfMemory(LookalikeError):
    """The device has no memory for this batch."""

    status = 503
    code = "out_of_memory"


class InvalidOutput(LookalikeError):
    """A file or folder that cannot be written, or already holds something else."""

    code = "invalid_output"


# Over HTTP alone ---------------------------------------------------------------------------------


class Unauthorized(LookalikeError):
    """No API key, or none that the service knows."""

    status = 401
    code = "unauthorized"


class Forbidden(LookalikeError):
    """An API key that may read, for a request that changes something."""

    status = 403
    code = "read_only_key"


class FingerprintMismatch(LookalikeError):
    """The request names the fingerprint of another encoder than the one that runs here."""

    status = 409
    code = "fingerprint_mismatch"


class UnknownModel(LookalikeError):
    """The request names a model that is not the one that runs here."""

    status = 404
    code = "model_not_found"


class SlowBody(LookalikeError):
    """The body did not come in full in the time that a body may take."""

    status = 408
    code = "slow_body"


class HeadersTooLarge(LookalikeError):
    """The headers of a request have more bytes than is taken."""

    status = 431
    code = "headers_too_large"


class Busy(LookalikeError):
    """As many requests as may wait for a work slot are waiting already."""

    status = 429
    code = "busy"


class Overloaded(LookalikeError):
    """The bodies that are being received have taken all the memory that they may."""

    status = 503
    code = "overloaded"


class TimedOut(LookalikeError):
    """The work took longer than a request may."""

    status = 504
    code = "timed_out"


# Lists -------------------------------------------------------------------------------------------


def kept(error: LookalikeError) -> LookalikeError:
    """Return an error as it can be kept: without its traceback.

    Whoever keeps an error is in that traceback, too, and so keeps, in a circle, all that the frames worked on: the
    bytes of bad pictures would stay until the next full collection.
    """
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


def each(what: str, members: Sequence[T], work: Callable[[T], R]) -> list[R]:
    """Do the work on every member; the error that is raised names all that failed."""
    done: list[R] = []
    failed: list[tuple[int, LookalikeError]] = []
    for number, member in enumerate(members):
        try:
            done.append(work(member))
        except LookalikeError as error:
            if len(members) == 1:
                raise
            failed.append((number, kept(error)))
    if not failed:
        return done
    number, first = failed[0]
    more = f"; {len(failed) - 1} more of {len(members)} failed, too" if len(failed) > 1 else ""
    raise type(first)(f"{what} {number}: {first}{more}", failed)


Outcome: TypeAlias = T | LookalikeError
"""What became of one element of a list: its value, or the error that concerns this element alone."""


def attempt(work: Callable[..., T], *arguments: Any) -> Outcome[T]:
    """Return the outcome of the work: what it returns, or the LookalikeError that it raises, without traceback."""
    try:
        return work(*arguments)
    except LookalikeError as error:
        return kept(error)
