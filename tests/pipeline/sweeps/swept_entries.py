"""Lines of a ledger, as tests of a sweep's result need them."""

from __future__ import annotations

from typing import Any

from pipeline.sweeps.ledger import LedgerEntry
from pipeline.sweeps.points import title


def entry(point: dict[str, Any], seed: int, value: float | None, **more: Any) -> LedgerEntry:
    status = more.pop("status", "finished" if value is not None else "failed")
    return LedgerEntry(
        key=f"{title(point)}-{seed}",
        point=point,
        title=title(point),
        seed=seed,
        run=f"run{seed}",
        status=status,
        value=value,
        metric="fid_x_n1",
        **more,
    )
