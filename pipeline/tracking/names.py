"""Names of metrics in the tracking store: `group/name`. MLflow's pages draw a section of charts for each group, in alphabetical order.

score    scores, as `score/fid_classifier_n559`; the same names without the group are those of `scores.json`, `runs` and `compare`
sweep    of a sweep's run the values of its trials, of a trial its rank
system   what depends on the machine: load, memory, power, speed, time; names as MLflow's own monitor gives them
train    the loss and what belongs to it
val      the same on images that are not trained on
"""

from __future__ import annotations

import re
from typing import Literal

Group = Literal["score", "sweep", "system", "train", "val"]
REPEATED: tuple[Group, ...] = ("system", "train", "val")  # logged again by a training that repeats steps after a resume
MAX_NAME_LENGTH = 250


def metric_name(group: Group, name: str) -> str:
    """Return a metric's name in the tracking store."""
    return clean_name(f"{group}/{name}")


def is_repeated(metric: str) -> bool:
    """Return whether a resumed training logs this metric again."""
    return metric.partition("/")[0] in REPEATED


def clean_name(name: str) -> str:
    """Replace characters that MLflow does not allow in names, and apply its length limit."""
    return re.sub(r"[^A-Za-z0-9_\-. :/]", "_", name)[:MAX_NAME_LENGTH]
