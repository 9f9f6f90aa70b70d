"""Long work for a service, in a process of low priority that opens the store beside it.

Searches share nothing with such a process but the processor. It ends with the service.
"""

import importlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import service.errors
from service.errors import InvalidStore, LookalikeError

_NICENESS = 19
_ROOT = Path(service.errors.__file__).parents[1]
# The folder that the parent runs in may hold files that have the names of our packages.
_CHILD = [
    sys.executable,
    "-P",
    "-c",
    f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from service import side_process; side_process.serve()",
]
# Several threads of a matrix library would take the cores from searches.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

# Takes the share of the work that is done, in [0, 1].
Tell = Callable[[float], object]


class SideProcess:
    """A process that calls the function `work` of a module.

    Attributes:
        progress: the share of the work that is done, in [0, 1).
    """

    def __init__(self, module: str, arguments: Sequence[str], purpose: str) -> None:
        """Start the process.

        Args:
            module: its function `work` takes a `Tell` and the arguments, and returns what `result` does.
            arguments: texts.
            purpose: what the process does, as "finds duplicates", for messages.
        """
        self.progress = 0.0
        self._purpose = purpose
        self._answer: dict[str, Any] = {}
        pipe = subprocess.PIPE
        environment = os.environ | _ONE_THREAD
        command = [*_CHILD, module, *arguments]
        # Its stdin stays open as long as this process lives; the child ends with it.
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)  # noqa: S603
        self._thread = threading.Thread(target=self._follow, name=module, daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether the process has ended and its answer is read."""
        return not self._thread.is_alive()

    def _follow(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answer = json.loads(line)
            self.progress = self._answer.get("progress", self.progress)
        self._process.wait()

    def result(self) -> dict[str, Any]:
        """Wait for the end and return the result. Raises what the process said, or InvalidStore if it said nothing."""
        self._thread.join()
        if "error" in self._answer:
            raise getattr(service.errors, self._answer["error"])(self._answer["says"])
        if "result" not in self._answer:
            raise InvalidStore(f"the process that {self._purpose} ended with status {self._process.returncode}")
        result: dict[str, Any] = self._answer["result"]
        return result

    def stop(self) -> None:
        """End the process, if it has not ended yet."""
        self._process.kill()
        self._thread.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()


def serve() -> None:
    """Do the work: the main function of the process. It prints lines of JSON."""
    os.nice(_NICENESS)
    # A service that has not saved a snapshot yet is no news.
    logging.disable(logging.WARNING)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    module, *arguments = sys.argv[1:]
    # What a library prints must not mix with the lines.
    lines, sys.stdout = sys.stdout, sys.stderr
    last = [-1.0]

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=lines, flush=True)

    def tell(share: float) -> None:
        if share - last[0] >= 0.01:
            last[0] = share
            say({"progress": round(min(share, 0.99), 2)})

    try:
        say({"result": importlib.import_module(module).work(tell, *arguments)})
    except LookalikeError as error:
        say({"error": type(error).__name__, "says": str(error)})


def _end_with_parent() -> None:
    # A buffered read would hold a lock that the interpreter wants when it ends.
    while os.read(0, 4096):
        pass
    os._exit(1)
