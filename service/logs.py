"""Logs as JSON lines on stderr: whatever a client sends, it stays one line and one value."""

import json
import logging
import sys
import time

access = logging.getLogger("bentoml.access")

# What every record has; the rest is what the call gave as extra.
_USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "taskName", "color_message"}

_encode = json.JSONEncoder(default=str).encode


class _JsonLines(logging.Formatter):
    """A record as one JSON object: time, level, logger, message, what was given as extra, traceback."""

    def __init__(self) -> None:
        super().__init__()
        self._second: tuple[int, str] = (0, "")

    def format(self, record: logging.LogRecord) -> str:
        second = int(record.created)
        if second != self._second[0]:
            self._second = (second, time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(second)))
        content = {
            "time": self._second[1],
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        content |= {name: value for name, value in vars(record).items() if name not in _USUAL}
        if record.exc_info:
            content["exc_info"] = self.formatException(record.exc_info)
        return _encode(content)


def handler() -> logging.Handler:
    """Return what writes one JSON object a line to stderr."""
    made = logging.StreamHandler(sys.stderr)
    made.setFormatter(_JsonLines())
    return made


def write_json_lines() -> None:
    """Let what BentoML, uvicorn and we log be written so, in place of BentoML's own form.

    No record looks for its place in the source, its thread and its process: no line tells them, and together they cost
    as much as the line.
    """
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # as the logging documentation says
    ours = handler()
    for name in ("", "bentoml", "uvicorn.error", "circus"):
        logger = logging.getLogger(name)
        theirs = [one for one in logger.handlers if type(one) is logging.StreamHandler]
        for other in theirs:
            logger.removeHandler(other)
        if theirs:
            logger.addHandler(ours)
