"""Placement groups of workers that nobody drives any more: found by a mark of our own, and given back.

Where the process that started a training is killed, Ray Train's workers die, but the placement group that held their CPUs stays until
a cleaner of Ray's notices, which needs the dashboard and but one Ray on the machine. Nobody else could start meanwhile.
"""

from __future__ import annotations

import hashlib

MAX_MARK = 1 << 20


def mark_of(run_id: str) -> float:
    """Return a number of bytes, below a megabyte, that a run's workers ask for: it tells their placement group from others'."""
    return float(1 + int.from_bytes(hashlib.sha256(run_id.encode()).digest()[:4], "big") % MAX_MARK)


def give_back(run_id: str) -> int:
    """Remove the placement groups of a run's workers, and return how many there were. None of its attempts may be alive."""
    from ray.util.placement_group import PlacementGroup, PlacementGroupID, placement_group_table, remove_placement_group

    mark, count = mark_of(run_id), 0
    for group_id, group in placement_group_table().items():
        if group["state"] != "REMOVED" and any(bundle.get("memory") == mark for bundle in group["bundles"].values()):
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group_id))))
            count += 1
    return count
