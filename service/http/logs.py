"""Logs as JSON lines on stderr: whatever a client sends, it stays one line and one value."""

import json
import logging
import sys
import time
from typing import Any

access = logging.getLogger("bentoml.access")

# What every record has; the rest is what the call gave as extra.
_PLAIN = vars(logging.makeLogRecord({}))
_USUAL = _PLAIN.keys() | {"message", "taskName", "color_message"}

_encode = json.JSONEncoder(default=str).encode


class Line(logging.LogRecord):
    """A record of a request: what LogRecord would look up of its place and process costs more than the line."""

    def __init__(self, message: str, fields: dict[str, Any]) -> None:
        self.__dict__.update(_PLAIN, name=access.name, levelno=logging.INFO, levelname="INFO", msg=message)
        self.__dict__.update(fields, created=time.time())
        self.fields = fields


class _JsonLines(logging.Formatter):
    """A record as one JSON object: time, level, logger, message, what was given as extra, traceback."""

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
    """Write the line of a request that was answered."""
    if access.isEnabledFor(logging.INFO):
        access.handle(Line("request", fields))


def handler() -> logging.Handler:
    """Return what writes one JSON object a line to stderr."""
    made = logging.StreamHandler(sys.stderr)
    made.setFormatter(_JsonLines())
    return made


def write_json_lines() -> None:
    """Let what BentoML, uvicorn and we log be written so, in place of BentoML's own form."""
    ours = handler()
    for name in ("", "bentoml", "uvicorn.error", "circus"):
        logger = logging.getLogger(name)
        theirs = [one for one in logger.handlers if type(one) is logging.StreamHandler]
        for other in theirs:
            logger.removeHandler(other)
        if theirs:
            logger.addHandler(ours)
