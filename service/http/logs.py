"""Logs as JSON lines on stderr. Text from a client stays inside one JSON value, so it cannot forge a line."""

import json
import logging
import sys
import time
from typing import Any

access = logging.getLogger("bentoml.access")

# Every record has these attributes; all others come from `extra`.
_PLAIN = vars(logging.makeLogRecord({}))
_USUAL = _PLAIN.keys() | {"message", "taskName", "color_message"}

_encode = json.JSONEncoder(default=str).encode


class Line(logging.LogRecord):
    """The record of a request, without LogRecord.__init__: looking up caller and process costs more than the line."""

    def __init__(self, message: str, fields: dict[str, Any]) -> None:
        self.__dict__.update(_PLAIN, name=access.name, levelno=logging.INFO, levelname="INFO", msg=message)
        self.__dict__.update(fields, created=time.time())
        self.fields = fields


class _JsonLines(logging.Formatter):
    """Formats a record as one JSON object: time, level, logger, message, the fields of `extra`, traceback."""

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
    """Log an answered request."""
    if access.isEnabledFor(logging.INFO):
        access.handle(Line("request", fields))


def handler() -> logging.Handler:
    """Return a handler that writes one JSON object per line to stderr."""
    made = logging.StreamHandler(sys.stderr)
    made.setFormatter(_JsonLines())
    return made


def write_json_lines() -> None:
    """Replace the handlers of BentoML, uvicorn and the root logger by ours."""
    ours = handler()
    for name in ("", "bentoml", "uvicorn.error", "circus"):
        logger = logging.getLogger(name)
        theirs = [one for one in logger.handlers if type(one) is logging.StreamHandler]
        for other in theirs:
            logger.removeHandler(other)
        if theirs:
            logger.addHandler(ours)
