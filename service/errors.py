"""Errors as a map of the data flow; each class is an arrow, or the result at its end.

    source ─read─▶ bytes ─decode─▶ picture ─resize─▶ pixels ─encode─▶ embedding ─search─▶ hits
      InvalidSource  │                │                  NoEmbedding     │          InvalidQuery
                     ├ EmptyPicture   ├ UndecodablePicture               │          ItemNotFound
                     ├ TooLarge       └ TooLarge (pixels, sides)         ▼
                     └ UnsupportedFormat                        store: InvalidStore, StoreMismatch

Around them: InvalidRequest (a request or a flag is malformed), InvalidModel (models/NAME), OutOfMemory, NoTextTower,
InvalidOutput (--out), NotOfThisStore and StoreAway (a store on Milvus); over HTTP also Unauthorized, Forbidden,
SlowBody, Busy, Overloaded, NoStore and TimedOut.
`status` is the HTTP status, `code` the word that programs read. At the command line each of them is one sentence on
stderr and exit code 2.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class LookalikeError(Exception):
    """Base of every error that a user may cause; str() is one sentence for that user.

    Attributes:
        parts: if the error is about members of a list, the position and the error of each bad member.
        retry_after_s: seconds after which the same request may succeed; None if waiting does not help.
    """

    status = 500
    code = "internal"
    retry_after_s: int | None = None

    def __init__(self, message: str, parts: "Sequence[tuple[int, LookalikeError]]" = ()) -> None:
        super().__init__(message)
        self.parts = tuple(parts)


class InvalidRequest(LookalikeError):
    """A parameter or a body is malformed."""

    status = 400
    code = "invalid_request"


class EmptyPicture(InvalidRequest):
    """A picture was expected, and its file is empty."""

    code = "empty_picture"


class TooLarge(LookalikeError):
    """Bytes, pixels, a side, an aspect ratio, characters or a number of members above the limit."""

    status = 413
    code = "too_large"


class UnsupportedFormat(LookalikeError):
    """The bytes are in no picture format that we decode, or the body in no form that we read."""

    status = 415
    code = "unsupported_format"


class UndecodablePicture(LookalikeError):
    """The bytes begin like a picture and then cannot be decoded."""

    status = 422
    code = "undecodable_picture"


class NoEmbedding(LookalikeError):
    """The encoder gives these pixels, or this text, no direction: its output is zero or not finite."""

    status = 422
    code = "no_embedding"


class InvalidQuery(InvalidRequest):
    """A search is malformed: wrong dimension, numbers that are not finite, k out of range."""

    code = "invalid_query"


class NoTextTower(InvalidRequest):
    """A text for an encoder that reads pictures alone."""

    code = "no_text_tower"


class PageNotFound(LookalikeError):
    """A cursor of groups that are not kept any more, or of another order."""

    status = 404
    code = "page_not_found"


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


class StorePaused(InvalidStore):
    """A store that takes no changes now, and will again by itself: its disk is full, or it is being replaced."""

    code = "store_paused"
    retry_after_s = 5


class StoreAway(InvalidStore):
    """A store on other machines that does not answer now."""

    code = "store_away"
    retry_after_s = 5


class NotOfThisStore(InvalidRequest):
    """A request for what this kind of store cannot do."""

    code = "not_of_this_store"


class ReadOnlyStore(InvalidStore):
    """A change of a store that was opened beside the process that writes it."""

    status = 403
    code = "read_only"


class StoreMismatch(LookalikeError):
    """A store whose embeddings were made by another encoder."""

    status = 409
    code = "store_mismatch"


class CountMismatch(LookalikeError):
    """More or fewer items match than the request expects."""

    status = 409
    code = "count_mismatch"


class NoStore(LookalikeError):
    """A request needs a store, and the service runs without one."""

    status = 404
    code = "no_store"


class OutOfMemory(LookalikeError):
    """The device has too little memory for this batch."""

    status = 503
    code = "out_of_memory"
    retry_after_s = 5


class InvalidOutput(LookalikeError):
    """A file or folder that cannot be written, or that holds something else already."""

    code = "invalid_output"


# Over HTTP alone ---------------------------------------------------------------------------------


class Unauthorized(LookalikeError):
    """The request has no API key, or one that the service does not know."""

    status = 401
    code = "unauthorized"


class Forbidden(LookalikeError):
    """The request changes something, and its API key may only read."""

    status = 403
    code = "read_only_key"


class FingerprintMismatch(LookalikeError):
    """The request expects another encoder, by fingerprint, than the one that runs here."""

    status = 409
    code = "fingerprint_mismatch"


class UnknownModel(LookalikeError):
    """The request names a model that is not the one that runs here."""

    status = 404
    code = "model_not_found"


class RangeNotSatisfiable(LookalikeError):
    """A range of bytes that begins behind the end."""

    status = 416
    code = "range_not_satisfiable"


class SlowBody(LookalikeError):
    """The body did not arrive completely in its time."""

    status = 408
    code = "slow_body"


class HeadersTooLarge(LookalikeError):
    """The headers of a request have more bytes than the limit."""

    status = 431
    code = "headers_too_large"


class Busy(LookalikeError):
    """The queue for a work slot is full."""

    status = 429
    code = "busy"
    retry_after_s = 1


class Overloaded(LookalikeError):
    """The bodies that are being received fill the memory that is set aside for them."""

    status = 503
    code = "overloaded"
    retry_after_s = 5


class TimedOut(LookalikeError):
    """The work took longer than a request is given."""

    status = 504
    code = "timed_out"


# Lists -------------------------------------------------------------------------------------------


def kept(error: LookalikeError) -> LookalikeError:
    """Strip an error of its traceback, cause and context, so that it can be stored, and return it.

    A stored exception forms a reference cycle through its traceback: the traceback refers to the frame that stores it,
    and so keeps all that the frames worked on. The bytes of bad pictures would stay until the next full collection.
    """
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


def each(what: str, members: Sequence[T], work: Callable[[T], R], first: int = 0) -> list[R]:
    """Do the work on every member of a list, and return the results in order.

    Args:
        what: names a member in messages, such as "picture".
        members: of the list.
        work: is called with one member.
        first: the number of the first member, if the list is a part of another.

    Raises:
        LookalikeError: the work raised it for one or more members. It is of the class of the first one, and its
            `parts` name them all.
    """
    done: list[R] = []
    failed: list[tuple[int, LookalikeError]] = []
    for number, member in enumerate(members, first):
        try:
            done.append(work(member))
        except LookalikeError as error:
            if len(members) == 1 and not first:
                raise
            failed.append((number, kept(error)))
    if not failed:
        return done
    number, earliest = failed[0]
    more = f"; {len(failed) - 1} more of {len(members)} failed, too" if len(failed) > 1 else ""
    raise type(earliest)(f"{what} {number}: {earliest}{more}", failed)


Outcome: TypeAlias = T | LookalikeError
"""What became of one element of a list: its value, or the error that concerns this element alone."""


def attempt(work: Callable[..., T], *arguments: Any) -> Outcome[T]:
    """Return the outcome of the work: its result, or the LookalikeError that it raises, without traceback."""
    try:
        return work(*arguments)
    except LookalikeError as error:
        return kept(error)


def map_values(outcomes: Sequence[Outcome[T]], work: Callable[[list[T]], Sequence[Outcome[R]]]) -> list[Outcome[R]]:
    """Call `work` once on all values, and return the outcome of every element; errors keep their places.

    Args:
        outcomes: values and errors.
        work: returns one outcome for each value. It is not called on an empty list.
    """
    values = [outcome for outcome in outcomes if not isinstance(outcome, LookalikeError)]
    results = iter(work(values) if values else [])
    return [outcome if isinstance(outcome, LookalikeError) else next(results) for outcome in outcomes]
