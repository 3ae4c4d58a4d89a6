"""Ports of a cluster: loopback on one machine, Ray's token between machines.

Ray runs any code that reaches its ports, so they are open to this machine only, or to holders of the token. The process group
of the learners has no token: its store listens on one address, never on all of them. docs/scaling.md lists all ports.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import secrets
import socket
import sys
from collections.abc import Iterable

import torch.distributed as dist

from deepgrpo.errors import ConfigError

MODE = "RAY_AUTH_MODE"
"""Environment variable of Ray 2.52 and later: "token" or "disabled"."""

_LOCAL = {
    # Ray replaces 127.0.0.1 by the machine's own address unless it thinks that it cannot form a cluster; which of the two it
    # reads depends on the version
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_OVERRIDE_NODE_IP_ADDRESS": "127.0.0.1",
}


def stay_local() -> None:
    """Prepare a Ray for this machine only: loopback addresses, and a token of its own. Called before Ray is imported."""
    os.environ.update(_LOCAL)
    if MODE in os.environ or "ray" in sys.modules:  # Ray reads the variable when it is imported
        return
    os.environ[MODE] = "token"
    if not os.environ.get("RAY_AUTH_TOKEN_PATH"):  # otherwise Ray would write one below the user's home
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def is_loopback(host: str) -> bool:
    """Return True for an address that only this machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_token(address: str, hosts: Iterable[str]) -> None:
    """Raise ConfigError if a cluster has nodes on other machines and this process uses no token.

    Args:
        address: `cluster.address`.
        hosts: addresses of the nodes.
    """
    mode = os.environ.get(MODE, "").lower()
    exposed = next((host for host in hosts if not is_loopback(host)), None)
    if exposed is not None and mode not in ("token", "disabled"):
        raise ConfigError(
            f"cluster.address is {address!r}, and its node {exposed} takes work without a token: anybody who reaches its ports "
            f"can run code there. Run `ray get-auth-token --generate` on one machine, copy its ~/.ray/auth_token to the "
            f"others, and set {MODE}=token for `ray start` and for this command; or set {MODE}=disabled if only trusted "
            "machines reach that network"
        )


# ---------------------------------------------------------------- the learners' process group


def listen(host: str) -> socket.socket:
    """Open a listening socket on one address, at a free port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family, backlog=128)


def join_group(
    host: str, port: int, rank: int, size: int, *, backend: str, timeout_s: float, listener: socket.socket | None = None
) -> None:
    """Join the default process group.

    Args:
        host: address of the store.
        port: port of the store.
        rank: this process's rank; 0 serves the store.
        size: number of processes.
        backend: gloo or nccl.
        timeout_s: time limit of a collective operation.
        listener: rank 0's socket at host and port; by itself torch would listen on all interfaces.
    """
    if is_loopback(host):
        # otherwise the interface would follow from the machine's name
        loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if loopback else ():
            os.environ.setdefault(variable, loopback[0])
    timeout = datetime.timedelta(seconds=timeout_s)
    descriptor = None if listener is None else listener.detach()
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host, port, size, is_master=rank == 0, timeout=timeout, master_listen_fd=descriptor
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
