"""The Ray session: found, started or joined, and its resources."""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from deepgrpo.cluster.network import MODE, check_token, stay_local
from deepgrpo.config import ClusterConfig
from deepgrpo.errors import ConfigError, EngineError, first_line, requires_extra
from deepgrpo.threads import available_cpus

OLDEST, TOO_NEW = (2, 52), (3, 0)
"""Supported versions of Ray: from the first, which brought the token, below the second."""

ANSWER_S = 5.0
"""Time limit in seconds for an address to accept a connection."""


def require_ray() -> ModuleType:
    """Import Ray. Raises MissingExtraError if it is not installed, ConfigError if its version is not supported."""
    # no usage reports unless the user asks for them, and no warning about a variable that we do not use
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with requires_extra("ray", "cluster", "a recipe with a section [cluster]"):
        import ray
    check_version(ray.__version__)
    return ray  # type: ignore[no-any-return]


def check_version(version: str) -> None:
    """Raise ConfigError if that version of Ray is not supported."""
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if not OLDEST <= found < TOO_NEW:
        wanted = f"{OLDEST[0]}.{OLDEST[1]} or later, below {TOO_NEW[0]}.{TOO_NEW[1]}"
        raise ConfigError(
            f"the installed Ray is {version}, but [cluster] needs {wanted}; "
            f'run: pip install "ray>={OLDEST[0]}.{OLDEST[1]},<{TOO_NEW[0]}"'
        )


@contextlib.contextmanager
def session(config: ClusterConfig) -> Iterator[None]:
    """Connect to Ray for the duration of the context. An existing connection of this process is used and left open.

    Raises ConfigError if the address does not answer, or runs another version.
    """
    if config.address is None:
        stay_local()
    ray = require_ray()
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    if config.address is None:
        # processes take turns, so one machine may run more of them than it has cores
        requested = (
            config.rollout_workers * config.cpus_per_worker + config.learners * config.cpus_per_learner
            + config.reward_workers * config.cpus_per_reward_worker
        )  # fmt: skip
        cpus = max(available_cpus(), math.ceil(requested))
        try:
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
        except Exception as error:  # Ray raises the bare class if one of its processes does not start
            raise EngineError(
                f"Ray did not start here ({' '.join(str(error).split())}); is it busy, or short of memory? More time: "
                "RAY_raylet_start_wait_time_s=300 in the environment. Its logs are in /tmp/ray/session_latest/logs"
            ) from error
    else:
        _join(ray, config.address, quiet)
    try:
        yield
    finally:
        ray.shutdown()


def _join(ray: ModuleType, address: str, quiet: dict[str, Any]) -> None:
    remedy = "start one there with `ray start --head`, or leave cluster.address out to start a Ray on this machine"
    if address != "auto":
        host, colon, port = address.rpartition(":")
        if "://" in address or not colon or not port.isdigit():
            raise ConfigError(
                f"cluster.address is {address!r}; write HOST:PORT as `ray start --head` shows it, or \"auto\", and run this "
                "command on a machine of the cluster"
            )
        try:
            socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
        except OSError as error:
            raise ConfigError(f"cluster.address is {address!r}, but nothing answers there ({error}); {remedy}") from error
    try:
        ray.init(address=address, **quiet)
        check_token(address, [str(node["NodeManagerAddress"]) for node in ray.nodes()])
    except ConfigError:
        ray.shutdown()
        raise
    except ray.exceptions.AuthenticationError as error:
        raise ConfigError(
            f"cluster.address is {address!r}, but that cluster refuses this process ({first_line(error)}); copy the "
            f"~/.ray/auth_token of its head to this machine and set {MODE}=token, as for `ray start`"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = first_line(error)
        if "ersion" in str(error):
            raise ConfigError(
                f"cluster.address is {address!r}, but that cluster runs other versions of Ray or Python than this process: "
                f"{' '.join(str(error).split())}; install the same on all machines"
            ) from error
        raise ConfigError(f"cluster.address is {address!r}, but no Ray cluster answers there ({first}); {remedy}") from error


# ---------------------------------------------------------------- resources


class Resources:
    """CPUs and GPUs that each process of a recipe requests from Ray.

    Args:
        device: as in `run.device`.
    """

    def __init__(self, cluster: ClusterConfig, device: str) -> None:
        import ray

        self.cuda = device.startswith("cuda") or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
        self.worker = {"CPU": cluster.cpus_per_worker, "GPU": (cluster.gpus_per_worker or 1.0) if self.cuda else 0.0}
        self.learner = {"CPU": cluster.cpus_per_learner, "GPU": (cluster.gpus_per_learner or 1.0) if self.cuda else 0.0}
        self.reward_worker = {"CPU": cluster.cpus_per_reward_worker, "GPU": 0.0}
        self.rollout_workers, self.learners = cluster.rollout_workers, cluster.learners
        self.reward_workers = cluster.reward_workers

    @property
    def device(self) -> str:
        """Device of learners and rollout workers. It has no number, because Ray shows each process its own GPUs only."""
        return "cuda" if self.cuda else "cpu"

    def check(self) -> None:
        """Raise ConfigError if the cluster is too small for all processes."""
        import ray

        total = ray.cluster_resources()
        for kind in ("GPU", "CPU"):
            has = total.get(kind, 0.0)
            learners, workers = self.learners * self.learner[kind], self.rollout_workers * self.worker[kind]
            if learners > has:
                raise ConfigError(
                    f"cluster.learners is {self.learners}, and each asks for {self.learner[kind]:g} {kind}, but the cluster "
                    f"has {has:g}; lower it or cluster.{kind.lower()}s_per_learner, or add machines"
                )
            if learners + workers > has:
                raise ConfigError(
                    f"cluster.rollout_workers is {self.rollout_workers} and cluster.learners {self.learners}, which together "
                    f"ask for {learners + workers:g} {kind}s, but the cluster has {has:g}; lower one of them, or "
                    f"cluster.{kind.lower()}s_per_worker, or add machines"
                )
            rewards = self.reward_workers * self.reward_worker[kind]
            if learners + workers + rewards > has:
                raise ConfigError(
                    f"cluster.reward_workers is {self.reward_workers}, which ask for {rewards:g} {kind}s, but of the cluster's "
                    f"{has:g} rollout workers and learners leave {has - learners - workers:g}; lower it or "
                    "cluster.cpus_per_reward_worker, or add machines"
                )

    def has_room(self, used: list[tuple[str, dict[str, float]]]) -> bool:
        """Return True if some node has room for a rollout worker.

        Args:
            used: (node id, resources) of each running process.
        """
        for node, has in nodes().items():
            free = {
                kind: has.get(kind, 0.0) - sum(taken[kind] for where, taken in used if where == node) for kind in self.worker
            }
            if all(free[kind] >= self.worker[kind] - 1e-6 for kind in free):
                return True
        return False


def nodes() -> dict[str, dict[str, float]]:
    """Return the resources of each live node, by node id."""
    import ray

    return {node["NodeID"]: dict(node["Resources"]) for node in ray.nodes() if node["Alive"]}


def ray_options(resources: dict[str, float]) -> dict[str, Any]:
    """Return the options of an actor with these resources."""
    return {"num_cpus": resources["CPU"], "num_gpus": resources["GPU"], "max_restarts": 0}
