"""Ports: on one machine every process of a run listens on loopback only; elsewhere Ray's token is asked for.

That Ray's own processes listen there is tested in test_driver.py, by the run that is resumed.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from deepgrpo.cluster.network import check_token, is_loopback, join_group, listen
from deepgrpo.engines.vllm import child
from deepgrpo.errors import ConfigError


def listening(*processes: psutil.Process) -> set[str]:
    """Addresses on which these processes accept connections."""
    return {
        each.laddr.ip.removeprefix("::ffff:")
        for process in processes
        for each in process.net_connections("inet")
        if each.status == psutil.CONN_LISTEN
    }


def in_fork(work: Callable[..., Any], *arguments: Any) -> Any:
    """Result of a function, called in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=lambda: theirs.send(work(*arguments)))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(60) else "no answer"
    except EOFError:
        return "it died"
    finally:
        process.kill()
        process.join()


def _group(rank: int, port: int, listener: socket.socket | None) -> set[str]:
    torch.set_num_threads(1)
    join_group("127.0.0.1", port, rank, 2, backend="gloo", timeout_s=60, listener=listener)
    total = torch.ones(2)
    dist.all_reduce(total)
    assert total.tolist() == [2, 2]
    found = listening(psutil.Process())
    dist.barrier()
    return found


def test_learners_listen_on_loopback() -> None:
    """torch's store, by itself, listens on all interfaces."""
    listener = listen("127.0.0.1")
    port = listener.getsockname()[1]
    context = multiprocessing.get_context("fork")
    other = context.Process(target=_group, args=(1, port, None))
    other.start()
    try:
        assert in_fork(_group, 0, port, listener) == {"127.0.0.1"}
    finally:
        listener.close()
        other.join(10)
        other.kill()


def _vllm_group() -> set[str]:
    os.environ["VLLM_HOST_IP"] = "127.0.0.1"
    child._stay_on_loopback()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    return listening(psutil.Process())


def test_the_process_group_of_vllm_listens_on_loopback() -> None:
    assert in_fork(_vllm_group) == {"127.0.0.1"}


def test_nodes_on_other_machines_need_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    check_token("auto", ["127.0.0.1", "::1"])
    with pytest.raises(ConfigError, match=r"10.0.0.5:6379., and its node 10.0.0.6 takes work without a token"):
        check_token("10.0.0.5:6379", ["127.0.0.1", "10.0.0.6"])
    for mode in ("token", "TOKEN", "disabled"):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        check_token("10.0.0.5:6379", ["10.0.0.6"])


def test_loopback_addresses() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.3.2.1", "::1", "localhost", "10.0.0.1", "::", "head")] == [
        True, True, True, True, False, False, False,
    ]  # fmt: skip
