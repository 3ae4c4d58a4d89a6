"""Ray itself: found, started or joined, and asked what it has."""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from deepgrpo.config import ClusterConfig, Config
from deepgrpo.errors import ConfigError, EngineError, MissingExtraError

OLDEST, TOO_NEW = (2, 49), (3, 0)
"""Versions of Ray: from the first on, below the second."""

ANSWER_S = 5.0
"""Seconds that an address has to accept a connection."""


def require_ray() -> ModuleType:
    """The package. Raises MissingExtraError if it is not there, ConfigError if its version is out of range."""
    # it must not report usage to anybody unasked, and not warn about what we do not use
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise MissingExtraError("ray", "cluster", "a recipe with a section [cluster]") from None
    check_version(ray.__version__)
    return ray  # type: ignore[no-any-return]


def check_version(version: str) -> None:
    """Raise ConfigError if we do not know that version of Ray."""
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if not OLDEST <= found < TOO_NEW:
        wanted = f"{OLDEST[0]}.{OLDEST[1]} or later, below {TOO_NEW[0]}.{TOO_NEW[1]}"
        raise ConfigError(
            f"the installed Ray is {version}, but [cluster] needs {wanted}; "
            f'run: pip install "ray>={OLDEST[0]}.{OLDEST[1]},<{TOO_NEW[0]}"'
        )


@contextlib.contextmanager
def session(config: ClusterConfig) -> Iterator[None]:
    """Inside, Ray is connected. A Ray that this process has already is used and left as it is.

    Raises ConfigError if the address does not answer, or is of another version.
    """
    ray = require_ray()
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    if config.address is None:
        # processes take turns, so that on one machine there may be more of them than cores
        asked = (
            config.rollout_workers * config.cpus_per_worker + config.learners * config.cpus_per_learner
            + config.reward_workers * config.cpus_per_reward_worker
        )  # fmt: skip
        cpus = max(os.cpu_count() or 1, math.ceil(asked))
        # nobody else needs to reach it
        try:
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
        except Exception as error:  # Ray raises the bare class where a part of it does not come up
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
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "ersion" in str(error):
            raise ConfigError(
                f"cluster.address is {address!r}, but that cluster runs other versions of Ray or Python than this process: "
                f"{' '.join(str(error).split())}; install the same on all machines"
            ) from error
        raise ConfigError(f"cluster.address is {address!r}, but no Ray cluster answers there ({first}); {remedy}") from error


# ---------------------------------------------------------------- what there is


class Needs:
    """What each process of a recipe asks Ray for."""

    def __init__(self, config: Config) -> None:
        assert config.cluster is not None
        import ray

        cluster, wanted = config.cluster, config.run.device
        self.cuda = wanted.startswith("cuda") or (wanted == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
        self.worker = {"CPU": cluster.cpus_per_worker, "GPU": (cluster.gpus_per_worker or 1.0) if self.cuda else 0.0}
        self.learner = {"CPU": cluster.cpus_per_learner, "GPU": (cluster.gpus_per_learner or 1.0) if self.cuda else 0.0}
        self.reward_worker = {"CPU": cluster.cpus_per_reward_worker, "GPU": 0.0}
        self.rollout_workers, self.learners = cluster.rollout_workers, cluster.learners
        self.reward_workers = cluster.reward_workers

    @property
    def device(self) -> str:
        """Of learners and rollout workers. Ray shows each process its own GPUs only, so there is no number."""
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

    def room(self, used: list[tuple[str, dict[str, float]]]) -> bool:
        """Whether a rollout worker fits on some node.

        Args:
            used: (node id, resources) of each process that is there.
        """
        for node, has in nodes().items():
            free = {
                kind: has.get(kind, 0.0) - sum(taken[kind] for where, taken in used if where == node) for kind in self.worker
            }
            if all(free[kind] >= self.worker[kind] - 1e-6 for kind in free):
                return True
        return False


def nodes() -> dict[str, dict[str, float]]:
    """Node id → its resources, of those that are alive."""
    import ray

    return {node["NodeID"]: dict(node["Resources"]) for node in ray.nodes() if node["Alive"]}


def ray_options(needs: dict[str, float]) -> dict[str, Any]:
    """An actor's options."""
    return {"num_cpus": needs["CPU"], "num_gpus": needs["GPU"], "max_restarts": 0}
