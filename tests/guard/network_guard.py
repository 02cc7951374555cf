"""Refuse every connection that leaves this machine, in any Python process that loads this module.

An audit hook sees each connect, datagram and name lookup before it happens, whatever library asks. Loopback addresses and sockets that are
not internet sockets pass; everything else fails as it would with the cable pulled: ENETUNREACH, or "name unknown" for a lookup. Libraries
that only ask "which address would I use?" by a UDP connect thus take their offline branch. Code that isn't Python is out of an audit
hook's sight; on Linux `tests/hermetic.py` runs the tests in a network namespace as well, which holds for every process.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import sys
from typing import Any

LOG_VARIABLE = "DDPM_PIPE_TEST_NETWORK_LOG"  # refused attempts are appended to this file, for the runner to judge
_INSTALLED = "_ddpm_pipe_network_guard"
_SENDS = {"socket.connect", "socket.sendto", "socket.sendmsg"}
_LOOKUPS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}


def is_local(host: str | bytes | None) -> bool:
    """Return whether `host` (address or name, as sockets take them) means this machine without asking anybody else."""
    text = (host.decode("ascii", "replace") if isinstance(host, bytes) else host or "").split("%")[0].lower()
    if text in {"", "localhost", "localhost.localdomain", "ip6-localhost", socket.gethostname().lower()}:
        return True
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback or address.is_unspecified


def _is_numeric(host: str | bytes | None) -> bool:
    """Return whether `host` is an address already, so that looking it up asks no server."""
    try:
        ipaddress.ip_address((host.decode("ascii", "replace") if isinstance(host, bytes) else host or "").split("%")[0])
    except ValueError:
        return False
    return True


def _note(event: str, target: object) -> None:
    path = os.environ.get(LOG_VARIABLE)
    if path:
        with open(path, "a", encoding="utf-8") as log:
            log.write(
                f"{event} {target!r} by pid {os.getpid()}: {' '.join(getattr(sys, 'argv', None) or ['?'])[:300]!r}\n"
            )


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if event in _SENDS:
        sock, address = args[0], args[1]
        is_internet = sock.family in (socket.AF_INET, socket.AF_INET6)
        # A datagram on a connected socket carries no address: its connect was judged already.
        if is_internet and address is not None and not is_local(address[0]):
            _note(event, address)
            raise OSError(
                errno.ENETUNREACH, f"{os.strerror(errno.ENETUNREACH)} (the tests allow loopback only): {address!r}"
            )
    elif event in _LOOKUPS:
        host = args[0]
        # Reading an address off its digits is free; the reverse question goes to a server.
        free = is_local(host) or (event != "socket.gethostbyaddr" and _is_numeric(host))
        if not free:
            _note(event, host)
            raise socket.gaierror(socket.EAI_NONAME, f"no name lookups in tests: {host!r}")


def install() -> None:
    """Put the guard on this process, once; an audit hook can't be taken off again."""
    if not getattr(sys, _INSTALLED, False):
        setattr(sys, _INSTALLED, True)
        sys.addaudithook(_hook)
