"""Ports on loopback that nobody listens on, and who listens where."""

from __future__ import annotations

import contextlib
import socket

import psutil


def free_ports(count: int, address: str = "127.0.0.1") -> list[int]:
    """Return different ports that nobody listened on a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((address, 0))
        return [each.getsockname()[1] for each in sockets]


def free_port(address: str = "127.0.0.1") -> int:
    """Return a port that nobody listened on a moment ago."""
    return free_ports(1, address)[0]


def listening_addresses(process: psutil.Process) -> set[str]:
    """Return the addresses on which `process` and its descendants accept connections."""
    family = [process, *process.children(recursive=True)]
    sockets = [connection for member in family for connection in member.net_connections(kind="inet")]
    return {connection.laddr.ip for connection in sockets if connection.status == psutil.CONN_LISTEN}
