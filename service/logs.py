"""Logs as JSON lines on stderr: whatever a client sends, it stays one line and one value."""

import logging
import sys

from pythonjsonlogger.json import JsonFormatter

access = logging.getLogger("bentoml.access")


def handler() -> logging.Handler:
    """Return what writes one JSON object a line to stderr."""
    made = logging.StreamHandler(sys.stderr)
    made.setFormatter(
        JsonFormatter(
            "{asctime}{levelname}{name}{message}",
            style="{",
            datefmt="%Y-%m-%dT%H:%M:%S%z",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            json_ensure_ascii=True,
        )
    )
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
