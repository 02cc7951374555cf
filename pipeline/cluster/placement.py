"""The placement groups of a run's workers, found by a mark of our own.

If the process that started a training is killed, Ray Train's workers die, but the placement group that holds their CPUs stays until a
cleaner of Ray's notices. That cleaner needs the dashboard and works with only one Ray on the machine. Until then nobody else could start.
"""

from __future__ import annotations

import contextlib
import hashlib
import time

MAX_MARK = 1 << 20
REMOVAL_S = 10.0


def mark_of(run_id: str) -> float:
    """Return a number of bytes, below a megabyte, that a run's workers reserve: it tells their placement group from others."""
    return float(1 + int.from_bytes(hashlib.sha256(run_id.encode()).digest()[:4], "big") % MAX_MARK)


def release(run_id: str) -> None:
    """Remove the placement groups of a run's workers, end what runs in them, and wait until their resources are free."""
    import ray
    from ray.util.placement_group import PlacementGroup, PlacementGroupID, remove_placement_group

    deadline = time.monotonic() + REMOVAL_S
    with contextlib.suppress(ray.exceptions.RayError):
        while (held := _groups_of(run_id)) and time.monotonic() < deadline:
            for group_id in held:
                remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group_id))))
            time.sleep(0.1)


def _groups_of(run_id: str) -> list[str]:
    from ray.util.placement_group import placement_group_table

    mark = mark_of(run_id)
    return [
        group_id
        for group_id, group in placement_group_table().items()
        if group["state"] != "REMOVED" and any(bundle.get("memory") == mark for bundle in group["bundles"].values())
    ]
