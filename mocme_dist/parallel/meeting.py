"""Rendezvous of ranks over sockets that listen only on the address that the other ranks use.

torch's own store listens on every interface, and any process that connects may read and write it: there is no token.
Gloo and NCCL listen on the interface that the host's name resolves to, which may be a public one, or loopback on one
of several machines.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import socket
import struct
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mocme_dist.environment import set_defaults

log = logging.getLogger(__name__)

_ADDRESS_OF_INTERFACE = 0x8915  # SIOCGIFADDR
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def listen(host: str, port: int = 0) -> socket.socket:
    """Return a socket that listens on `host` only.

    It listens on every interface if only other machines resolve `host` to an address of this one: a service's name,
    or a name that /etc/hosts maps to 127.0.1.1.

    Args:
        host: name or address by which the other ranks reach this machine. port: 0 takes a free one.
    """
    address = socket.gethostbyname(host)
    if address.startswith("127.") and not host.startswith(("127.", "localhost")):
        address = ""
    try:
        return socket.create_server((address, port))
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        return socket.create_server(("", port))


def open_store(listening: socket.socket, timeout: timedelta) -> Any:
    """Return the ranks' store, served by this process on a listening socket, which the store takes over."""
    host, port = listening.getsockname()[:2]
    return dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1" if host == "0.0.0.0" else host,
        port,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )


def join_store(host: str, port: int, timeout: timedelta) -> Any:
    """Return the store that rank 0 serves at this address; waits for it."""
    store = dist.TCPStore  # type: ignore[attr-defined]
    return store(host, port, is_master=False, timeout=timeout, wait_for_workers=False)


def listen_beside(host: str) -> None:
    """Make gloo and NCCL listen on the interface that leads to `host`, unless the environment names one."""
    if (name := interface_towards(host)) is not None:
        set_defaults(dict.fromkeys(_INTERFACES, name))


def interface_towards(host: str) -> str | None:
    """Return the network interface by which this machine reaches `host`, or None if it cannot be determined."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                if _address_of(probe, name) == own or (own.startswith("127.") and name.startswith("lo")):
                    return name
    except OSError as error:
        log.debug("no interface towards %s: %s", host, error)
    return None


def _address_of(probe: socket.socket, interface: str) -> str | None:
    try:
        answer = fcntl.ioctl(probe, _ADDRESS_OF_INTERFACE, struct.pack("256s", interface.encode()))
    except OSError:  # an interface without an IPv4 address
        return None
    return socket.inet_ntoa(answer[20:24])
