"""A Ray cluster of several nodes on this machine, in a process of its own; all of it is gone when the block ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.processes import children, wait_until

SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
"""Ray's processes report to nobody, and do not stand back behind everything else on a busy machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Nodes:
    """A cluster.

    Attributes:
        address: Where it answers.
        raylets: Process ids of its nodes, the head first.
    """

    address: str
    raylets: tuple[int, ...]


@contextmanager
def ray_nodes(*cpus: int) -> Iterator[Nodes]:
    """A head and more nodes, each with so many processors to give."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.ray_nodes", *map(str, cpus)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", **SETTINGS},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    started: set[int] = set()
    try:
        told = json.loads(process.stdout.readline())
        started = children(process.pid)
        yield Nodes(address=told["address"], raylets=tuple(told["raylets"]))
    finally:
        started |= children(process.pid)
        process.stdin.close()
        process.wait()
        for child in started:  # what its own end has not reached
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        process.stdout.close()


@contextmanager
def hidden_node(address: str, folder: Path, *, cpus: int = 1) -> Iterator[int]:
    """One more node, which sees an empty folder in the place of `folder`: it is in a mount namespace of its own."""
    ray = f'"{sys.executable}" -m ray.scripts.scripts start --address={address} --num-cpus={cpus} --block'
    script = f'mount -t tmpfs none "{folder}" && exec {ray}'
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script],
        env={**os.environ, **SETTINGS},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: any(_name(child) == "raylet" for child in children(process.pid)))
        yield process.pid
    finally:
        for child in (*children(process.pid), process.pid):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        process.wait()


def can_hide() -> bool:
    """Whether this user may have a mount namespace."""
    with suppress(OSError):
        return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0
    return False


def _name(process: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{process}/comm").read_text().strip()
    return ""


def _serve(cpus: list[int]) -> None:
    """Start the nodes, say where they are, and end them with the input."""
    from ray._private.ray_constants import PROCESS_TYPE_RAYLET
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus[0], "include_dashboard": False})
    nodes = [cluster.head_node, *(cluster.add_node(num_cpus=n) for n in cpus[1:])]
    cluster.wait_for_nodes()
    raylets = [node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid for node in nodes]
    sys.stdout.write(json.dumps({"address": cluster.address, "raylets": raylets}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    _serve([int(word) for word in sys.argv[1:]])
