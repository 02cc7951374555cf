"""The early scores of a sweep's trial: a line in a file of its run for each rung, written before the driver learns of it.

The driver may be killed. The next one reads the scores of resumed trials here, since a worker that resumes from a later step does not
measure earlier rungs again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FILE = "judgements.jsonl"


def note(run_folder: Path, judgement: dict[str, Any]) -> Path:
    """Add a judgement (`rung`, `step`, `metric`, `value`, `std`, `identity`), and return the file."""
    path = run_folder / FILE
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(judgement) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return path


def values_by_rung(run_folder: Path) -> dict[float, float]:
    """Return the newest value at each rung; a line that a kill cut short is skipped."""
    path = run_folder / FILE
    found: dict[float, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            judgement = json.loads(line)
            found[float(judgement["rung"])] = float(judgement["value"])
        except (ValueError, KeyError, TypeError):
            continue
    return found
