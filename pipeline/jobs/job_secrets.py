"""Secret variables on their way to a job, so that nothing that Ray shows or keeps holds them.

Ray shows a job's environment in plain text to everybody who may ask about jobs, for as long as the cluster remembers the job. So the
values travel in two halves, each of them random without the other (a one-time pad): one in the environment, the other in the cluster's
store, where the job takes it out as it begins. Afterwards what the cluster shows and keeps says nothing. Who holds the cluster's token can
still run code beside the job and read its memory: a token is access to everything on a cluster, and no packing changes that.
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
    """Return the two halves of the variables: a text for the environment, and bytes for the store."""
    plain = json.dumps(dict(values)).encode()
    pad = secrets.token_bytes(len(plain))
    return base64.b64encode(pad).decode(), _xor(plain, pad)


def joined(pad: str, other: bytes) -> dict[str, str]:
    """Return the variables again."""
    values: dict[str, str] = json.loads(_xor(other, base64.b64decode(pad)))
    return values


def store_key(job: str) -> str:
    """Return the name under which a job's half stands in the cluster's store."""
    return f"ddpm-pipe-{job}.zip"


def receive() -> None:
    """Put this job's secret variables into its environment, and take their half out of the cluster's store."""
    pad = os.environ.pop(PAD_VARIABLE, None)
    if pad is None:
        return
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    store = GcsClient(address=os.environ["RAY_ADDRESS"])
    key = f"gcs://{store_key(os.environ[JOB_VARIABLE])}".encode()
    other = store.internal_kv_get(key, None)
    if other is None:
        raise ClusterError(
            "the secret variables sent with this job are gone: a job takes them once; send the command again"
        )
    store.internal_kv_del(key, False, None)
    os.environ.update(joined(pad, other))


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))
