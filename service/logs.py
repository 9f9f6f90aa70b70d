"""Logs as JSON lines on stderr: whatever a client sends, it stays one line and one value."""

import logging
import sys

from pythonjsonlogger.json import JsonFormatter

access = logging.getLogger("bentoml.access")


def write_json_lines() -> None:
    """Send what BentoML, uvicorn and we log to stderr, one JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter("%(message)s", rename_fields={"levelname": "level", "asctime": "time"}, json_ensure_ascii=True)
    )
    handler.setFormatter(
        JsonFormatter(
            "{asctime}{levelname}{name}{message}",
            style="{",
            datefmt="%Y-%m-%dT%H:%M:%S%z",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            json_ensure_ascii=True,
        )
    )
    for name in ("", "bentoml", "uvicorn.error", "circus"):
        logger = logging.getLogger(name)
        ours = [one for one in logger.handlers if type(one) is logging.StreamHandler]
        for other in ours:
            logger.removeHandler(other)
        if ours or name == "bentoml":
            logger.addHandler(handler)
