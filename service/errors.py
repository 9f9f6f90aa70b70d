"""What can go wrong, as a map of the data flow; each class is an arrow or what stands at its end.

    source ─read─▶ bytes ─decode─▶ picture ─resize─▶ pixels ─encode─▶ embedding ─search─▶ hits
      InvalidSource  │                │                  NoEmbedding     │          InvalidQuery
                     ├ EmptyPicture   ├ UndecodablePicture               │          ItemNotFound
                     ├ TooLarge       └ TooLarge (pixels, sides)         ▼
                     └ UnsupportedFormat                        store: InvalidStore, StoreMismatch

Around them: InvalidRequest (what a request or a flag says), InvalidModel (models/NAME), InvalidOutput (--out).
`status` is what HTTP answers, `code` the word a program reads. At the command line every one of them
is one sentence on stderr and exit code 2.
"""


class LookalikeError(Exception):
    """Base of every error that a user may cause; str() is one sentence for that user."""

    status = 500
    code = "internal"


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


class InvalidOutput(LookalikeError):
    """A file or folder that cannot be written, or already holds something else."""

    code = "invalid_output"
