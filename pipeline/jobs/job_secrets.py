"""Send secret variables to a job without leaving them in anything that Ray shows or keeps.

Ray shows a job's environment in plain text to everybody who may list jobs, as long as the cluster remembers the job. So the values are sent
in two halves, each random without the other (a one-time pad): one in the environment, the other in the cluster's store, from which the job
removes it at its start. Afterwards the cluster keeps only one half. A holder of the cluster's token can still run code beside the job and
read its memory: the token gives access to everything on the cluster.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
from collections.abc import Mapping

from pipeline.errors import ClusterError
from pipeline.storage.provenance import JOB_VARIABLE

PAD_VARIABLE = "DDPM_PIPE_PAD"


def halves(values: Mapping[str, str]) -> tuple[str, bytes]:
    """Return the two halves: a text for the environment, and bytes for the store."""
    plain = json.dumps(dict(values)).encode()
    pad = secrets.token_bytes(len(plain))
    return base64.b64encode(pad).decode(), _xor(plain, pad)


def joined(pad: str, other: bytes) -> dict[str, str]:
    """Return the variables from the two halves."""
    values: dict[str, str] = json.loads(_xor(other, base64.b64decode(pad)))
    return values


def store_key(job: str) -> str:
    """Return the name of a job's half in the cluster's store."""
    return f"ddpm-pipe-{job}.zip"


def receive() -> None:
    """Put this job's secret variables into its environment, and remove their half from the cluster's store."""
    pad = os.environ.pop(PAD_VARIABLE, None)
    if pad is None:
        return
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    store = GcsClient(address=os.environ["RAY_ADDRESS"])
    key = f"gcs://{store_key(os.environ[JOB_VARIABLE])}".encode()
    other = store.internal_kv_get(key, None)
    if other is None:
        raise ClusterError(
            "the secret variables of this job were read before, and can be read only once; send the command again"
        )
    store.internal_kv_del(key, False, None)
    os.environ.update(joined(pad, other))


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))
