"""A Ray cluster that trains a run's clients: found, and each of its nodes looked at, before anything else happens."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import structlog

from common.disk import disk_errors
from common.errors import RunError
from simulations.cluster.actor import SharedFolder
from simulations.cluster.check import LOCK, Answer, Facts, facts_of, look
from simulations.sites import SimulatedSites

log = structlog.get_logger()

MARKER: Final = "cluster.token"
"""File in a run's folder by which a process knows the folder."""
_NODES: Final = "nodes"
_CONNECT_SECONDS: Final = 10.0
_CHECK_SECONDS: Final = 600.0
"""Longest wait for a node's answer: it loads the data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """A cluster whose nodes can train this run.

    Attributes:
        clients: Most clients at a time; None: one for each processor.
        gpus: Accelerators, or a share of one, for each client.
        shared: What a process looks for before it serves; None where clients write nothing.
    """

    clients: int | None
    gpus: float
    shared: SharedFolder | None

    @staticmethod
    def reachable(sites: SimulatedSites) -> SimulatedSites:
        """The same sites for processes that work in another folder."""
        return replace(
            sites,
            folder=sites.folder.absolute(),
            site_file=sites.site_file.absolute() if sites.site_file else None,
            journals=sites.journals.absolute() if sites.journals else None,
        )


@contextmanager
def cluster_at(
    address: str,
    sites: SimulatedSites,
    *,
    folder: Path | None,
    guarded: bool,
    clients: int | None = None,
    gpus: float = 0.0,
) -> Iterator[Cluster]:
    """Connect to a Ray cluster, and look at every node that can train a client.

    Args:
        address: `auto`, or the head node's host and port.
        sites: The run that is simulated.
        folder: The run's folder, or None.
        guarded: Whether clients keep ledgers or keys: then every node has to share the folder.
        clients: Most clients at a time; None: one for each processor.
        gpus: Accelerators, or a share of one, for each client.

    Raises:
        RunError: There is no cluster, or a node is not fit for the run; it is named.
    """
    _connect(address)
    import ray

    try:
        yield _checked(Cluster.reachable(sites), folder, guarded=guarded, clients=clients, gpus=gpus)
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a call after the end would find some other cluster
    try:
        import ray
    except ImportError as e:
        raise RunError("Ray is not installed", hint="pip install 'coterie[ray]', or use --engine inline") from e
    if "://" in address:
        raise RunError(
            f"{address} is no Ray cluster's own address",
            hint="start the run on a node of the cluster: host:port, or auto",
        )
    if address != "auto":
        _check_listens(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    path = os.environ.get("PYTHONPATH")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray warns about itself
        logging.getLogger("ray").setLevel(logging.ERROR)
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env={"env_vars": {"PYTHONPATH": path}} if path else None,
            )
        except (ConnectionError, RuntimeError, ValueError, OSError) as e:
            said = str(e).strip().splitlines()
            raise RunError(
                f"no Ray cluster at {address}: {said[0] if said else type(e).__name__}",
                hint="`ray start --head` starts one, `ray status` shows it; all machines need the same Ray and Python",
            ) from e


def _check_listens(address: str) -> None:
    """Raise RunError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (ValueError, OSError, OverflowError) as e:
        said = e.strerror if isinstance(e, OSError) else "expected host:port, or auto"
        raise RunError(
            f"no Ray cluster at {address}: {said or e}",
            hint="`ray start --head` starts one; its port is 6379 by default",
        ) from e


def _checked(sites: SimulatedSites, folder: Path | None, *, guarded: bool, clients: int | None, gpus: float) -> Cluster:
    nodes = _able()
    if not nodes:
        raise RunError("the Ray cluster has no node with a processor to give", hint="see `ray status`")
    if folder is None:
        if guarded:
            raise RunError("ledgers and keys on a cluster need a run folder", hint="name one that all nodes share")
        _refuse_unlike(facts_of(sites), _ask(nodes, sites, files={}), nodes)
        return Cluster(clients=clients, gpus=gpus, shared=None)
    with _files(folder.absolute(), nodes) as files:
        tokens = {node: file.read_text(encoding="ascii") for node, file in files.items()}
        answers = _ask(nodes, sites, files=files)
        _refuse_unlike(facts_of(sites), answers, nodes)
        apart = {node: why for node in nodes if (why := _why_apart(answers[node], tokens[node], files[node]))}
    if apart and guarded:
        node, why = next(iter(apart.items()))
        raise RunError(
            f"Ray node {nodes[node]} {why}: {folder.absolute()}",
            hint="put it where every node sees it at the same path (--out), or run without privacy and sealing",
        )
    if apart:
        log.warning("ray_nodes_without_run_folder", nodes=[nodes[node] for node in apart])
    return Cluster(clients=clients, gpus=gpus, shared=_mark(folder.absolute()) if guarded else None)


def _able() -> dict[str, str]:
    """Names for people, by Ray's id, of the nodes that live and can train a client."""
    import ray

    return {
        node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) > 0
    }


@contextmanager
def _files(folder: Path, nodes: Mapping[str, str]) -> Iterator[dict[str, Path]]:
    """A file for each node, with a fresh token in it, beside a lock that is held."""
    place = folder / _NODES
    with disk_errors(place):
        place.mkdir(exist_ok=True)
        files = {node: place / node for node in nodes}
        lock = os.open(place / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for file in files.values():
                file.write_text(secrets.token_hex(16), encoding="ascii")
            yield files
        finally:
            os.close(lock)
            for file in (*files.values(), place / LOCK):
                file.unlink(missing_ok=True)
            place.rmdir()


def _ask(nodes: Mapping[str, str], sites: SimulatedSites, *, files: Mapping[str, Path]) -> dict[str, Answer]:
    """What each node says, by Ray's id."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(look)
    asked = {
        node: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            sites, files.get(node)
        )
        for node in nodes
    }
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=_CHECK_SECONDS)
    answers: dict[str, Any] = {}
    for node, future in asked.items():
        try:
            answers[node] = ray.get(future, timeout=0)
        except RayError as e:
            cause = getattr(e, "cause", None)
            said = f"{type(cause or e).__name__}: {str(cause or e).strip().splitlines()[0] if str(cause or e) else ''}"
            raise RunError(
                f"Ray node {nodes[node]} cannot run Coterie: {said}",
                hint="install the same Coterie, with its ray extra, on every node",
            ) from e
    return answers


def _refuse_unlike(own: Facts, answers: Mapping[str, Answer], nodes: Mapping[str, str]) -> None:
    for node, answer in answers.items():
        if unlike := own.differences(answer.facts):
            raise RunError(
                f"Ray node {nodes[node]} has {unlike}",
                hint="every node needs the same Coterie, Python and data as the machine that starts the run",
            )


def _why_apart(answer: Answer, token: str, file: Path) -> str:
    """Why a node does not share the run's folder, as a predicate; empty where it does."""
    if answer.token != token:
        return "does not see the run folder"
    if file.read_text(encoding="ascii") != answer.written:
        return "writes what this machine does not see into the run folder"
    return "" if answer.locks else "does not see locks on the run folder, which its file system has to pass on"


def _mark(folder: Path) -> SharedFolder:
    shared = SharedFolder(marker=folder / MARKER, token=secrets.token_hex(16))
    with disk_errors(shared.marker):
        shared.marker.write_text(shared.token, encoding="ascii")
    return shared
