"""Access to a Ray cluster by token. Whoever reaches a cluster without a token may run code on it, so such a cluster is refused.

The token comes from RAY_AUTH_TOKEN, else from the file RAY_AUTH_TOKEN_PATH, else from ~/.ray/auth_token, as in Ray itself. It is sent in
request headers and in the environment of Ray's processes alone, and appears in no arguments, profiles, records or logs.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.config.cluster_profile import Profile
from pipeline.errors import ClusterError, UsageError
from pipeline.redaction import redact

TIMEOUT_S = 10.0
ANY_NODE_SERVICE = "/ray.rpc.NodeInfoGcsService/CheckAlive"  # the cheapest request to Ray's control store


class Access(Enum):
    """A cluster's answer."""

    OPEN = "accepts the request"
    CLOSED = "requires a token, or another one"
    ABSENT = "does not answer"


AuthProbe = Callable[[str, str | None], Access]  # of address and token


def find_token() -> tuple[str | None, str]:
    """Return the user's token for clusters, and the variable or file that has it or should have it."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        token = ""
    return token or None, str(path)


def admission(profile: Profile, address: str, probe: AuthProbe) -> str | None:
    """Return the token for the cluster at an address; None if it needs none and the profile accepts that.

    Raises:
        UsageError: the cluster requires no token, or the user has none or a wrong one.
        ClusterError: no cluster answers.
    """
    access = probe(address, None)
    if access is Access.ABSENT:
        raise ClusterError(
            f"profile {profile.name!r}: no Ray cluster answers at {address}; is it up, and is the address right?"
        )
    if access is Access.OPEN:
        if not profile.insecure:
            raise UsageError(
                f"profile {profile.name!r}: the cluster at {address} lets anybody run code on it; start it with RAY_AUTH_MODE=token "
                "(ray get-auth-token --generate makes one), or accept that with insecure: true in the profile"
            )
        return None
    token, where = find_token()
    if token is None:
        raise UsageError(
            f"profile {profile.name!r}: the cluster at {address} asks for a token, and there is none in {where}; "
            "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's"
        )
    if probe(address, token) is not Access.OPEN:
        raise UsageError(
            f"profile {profile.name!r}: the cluster at {address} refuses the token of {where}; set the cluster's own"
        )
    return token


def probe_store(address: str, token: str | None) -> Access:
    """Ask a cluster's control store (HOST:PORT)."""
    import grpc

    metadata = [("authorization", f"Bearer {token}")] if token else None
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(ANY_NODE_SERVICE)(b"", timeout=TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            refused = error.code() in {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}
            return Access.CLOSED if refused else Access.ABSENT
    return Access.OPEN


def probe_dashboard(address: str, token: str | None) -> Access:
    """Ask a cluster's dashboard (http or https).

    Raises ClusterError if something other than Ray answers, or if its certificate is not trusted.
    """
    request = urllib.request.Request(f"{address.rstrip('/')}/api/version")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            body = answer.read(10_000)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in {401, 403}:
            return Access.CLOSED
        raise ClusterError(
            f"{address}: answers {error.code} where Ray's dashboard would answer; is the address right?"
        ) from None
    except http.client.HTTPException:
        raise ClusterError(f"{address}: what answers there does not speak HTTP; is the address right?") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            raise ClusterError(
                f"{address}: no secure connection: {redact(str(reason))}; if an authority of your own signed the certificate, set "
                "SSL_CERT_FILE and REQUESTS_CA_BUNDLE to the authority's file; if the server speaks plain http, use http://"
            ) from None
        return Access.ABSENT
    try:
        json.loads(body)["ray_version"]
    except (ValueError, KeyError, TypeError):
        raise ClusterError(f"{address}: something answers that is not Ray's dashboard; is the address right?") from None
    return Access.OPEN


def travels_readable(address: str) -> bool:
    """Whether others can read what is sent to an address: plain http to another machine."""
    parts = urlsplit(address)
    host = parts.hostname or ""
    return parts.scheme == "http" and not (host == "localhost" or host.startswith("127.") or host == "::1")
