"""Ports: on one machine every process of a run listens on loopback only; elsewhere Ray's token is asked for."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
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


SESSION = """
import psutil
from deepgrpo.cluster.session import session
from deepgrpo.config import ClusterConfig
with session(ClusterConfig()):
    import ray

    @ray.remote
    def port():
        pass

    ray.get(port.remote())
    me = psutil.Process()
    print(sorted({
        each.laddr.ip.removeprefix("::ffff:") for process in [me, *me.children(recursive=True)]
        for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN
    }))
    import os
    print(os.environ["RAY_AUTH_MODE"])
"""


def test_ray_listens_on_loopback() -> None:
    """In an interpreter of its own, without the variables that the tests set, and with a home that cannot be written."""
    pytest.importorskip("ray")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "RAY_worker_niceness": "0"
    }
    done = subprocess.run([sys.executable, "-c", SESSION], capture_output=True, text=True, env=environ, timeout=280)
    assert done.stdout.split("\n")[:2] == ["['127.0.0.1']", "token"], done.stderr


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
