"""Ctrl-C and SIGTERM during long work: the step in hand is finished and saved first."""

import signal
import sys
import threading
from types import FrameType
from typing import NoReturn


class StopSignal:
    """A context in which SIGINT and SIGTERM only set `asked`; a second signal interrupts at once.

    Attributes:
        asked: the signal's number, 0 if none came.
    """

    asked: int = 0

    def __enter__(self) -> "StopSignal":
        self._before = {}
        # Python allows signal handlers in the main thread alone.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """End the process if a signal asked for it. Raises as `end`."""
        if self.asked:
            self.end(self.asked)

    def end(self, asked: int) -> NoReturn:
        """End the process as the signal of this number asked.

        Raises:
            KeyboardInterrupt: SIGINT came.
            SystemExit: SIGTERM came; exit code 143.
        """
        if asked == signal.SIGTERM:
            sys.exit(128 + signal.SIGTERM)
        raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number
