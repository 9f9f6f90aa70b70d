"""The log of a run: JSON lines for programs, TensorBoard events for people."""

import json
import math
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from service.files import write_file

FILE = "log.jsonl"


class Log:
    """Appends to the log in a run's folder. Opening it removes the lines written after the run's checkpoint."""

    def __init__(self, folder: Path, step: int) -> None:
        """Open the log of a run that continues after `step`; 0 begins a new log."""
        path = folder / FILE
        kept = _lines_up_to(path, step) if step else []
        write_file(path, "".join(f"{line}\n" for line in kept).encode())
        if not step:
            for events in folder.glob("events.out.tfevents.*"):
                events.unlink()
        # With line buffering a kill loses at most the current line.
        self._lines = path.open("a", buffering=1)
        self._events = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, step: int, **values: float) -> None:
        """Write named scalars of a step."""
        # JSON cannot express NaN and infinity.
        rounded = {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, **rounded}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both files."""
        self._lines.close()
        self._events.close()


def _lines_up_to(path: Path, step: int) -> list[str]:
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            # A kill cut the line short.
            continue
    return kept
