"""Learners as plain processes, joined by gloo: what `cluster/sharding.py` needs, without Ray."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _rank(rank: int, size: int, port: int, work: Callable[..., Any], arguments: Sequence[Any], results: Any) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=size)
        results.put((rank, work(rank, *arguments), None))
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def run_group(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(rank, *arguments)` returns on each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_rank, args=(r, size, port, work, arguments, results)) for r in range(size)]
    for process in processes:
        process.start()
    found = {}
    try:
        for _ in range(size):
            rank, value, error = results.get(timeout=120)
            assert error is None, error
            found[rank] = value
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    return [found[rank] for rank in range(size)]


def close(a: Any, b: Any) -> None:
    """Weights or figures by name: within 1e-5."""
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_allclose(a[key], b[key], rtol=1e-5, atol=1e-6, err_msg=key)
