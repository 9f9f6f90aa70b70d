"""Logs as JSON lines on stderr; text of a client stays inside one line and one value."""

import json
import logging
import sys
import time
from typing import Any

access = logging.getLogger("bentoml.access")

# The attributes that every record has; all others came as `extra` of the call.
_PLAIN = vars(logging.makeLogRecord({}))
_USUAL = _PLAIN.keys() | {"message", "taskName", "color_message"}

_encode = json.JSONEncoder(default=str).encode


class Line(logging.LogRecord):
    """A record of a request. LogRecord's own constructor looks up the caller, which costs more than the line."""

    def __init__(self, message: str, fields: dict[str, Any]) -> None:
        self.__dict__.update(_PLAIN, name=access.name, levelno=logging.INFO, levelname="INFO", msg=message)
        self.__dict__.update(fields, created=time.time())
        self.fields = fields


class _JsonLines(logging.Formatter):
    """Formats a record as one JSON object: time, level, logger, message, the extra fields, traceback."""

    def __init__(self) -> None:
        super().__init__()
        self._second: tuple[int, str] = (0, "")

    def format(self, record: logging.LogRecord) -> str:
        second = int(record.created)
        if second != self._second[0]:
            self._second = (second, time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(second)))
        content: dict[str, Any] = {
            "time": self._second[1],
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if isinstance(record, Line):
            content |= record.fields
        else:
            content |= {name: value for name, value in vars(record).items() if name not in _USUAL}
        if record.exc_info:
            content["exc_info"] = self.formatException(record.exc_info)
        return _encode(content)


def request(fields: dict[str, Any]) -> None:
    """Write the line of an answered request."""
    if access.isEnabledFor(logging.INFO):
        access.handle(Line("request", fields))


def handler() -> logging.Handler:
    """Return a handler that writes one JSON object a line to stderr."""
    made = logging.StreamHandler(sys.stderr)
    made.setFormatter(_JsonLines())
    return made


def write_json_lines() -> None:
    """Have all logs of this process written as JSON lines: BentoML's, uvicorn's and ours."""
    ours = handler()
    for name in ("", "bentoml", "uvicorn.error", "circus"):
        logger = logging.getLogger(name)
        theirs = [one for one in logger.handlers if type(one) is logging.StreamHandler]
        for other in theirs:
            logger.removeHandler(other)
        if theirs:
            logger.addHandler(ours)
