"""How a run is carried out, beside its configuration: kept in its folder, for whoever continues or repeats it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Self

from common.errors import ConfigError, RunError
from server.store import RunFolder
from simulations.batching import Batching

EngineName = Literal["inline", "ray"]

HOW: Final = "how.json"
TRACE: Final = "trace.jsonl"
"""Names in a run's folder."""

_KEPT: Final = ("site_file", "sealed", "batching", "insecure_seed")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterOptions:
    """A Ray cluster, and how it is used.

    Attributes:
        address: `host:port`, or `auto`.
        clients: Most clients at a time; None: one for each of its processors.
        gpus: Accelerators, or a share of one, that each client takes.
    """

    address: str
    clients: int | None = None
    gpus: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class How:
    """The options of `coterie simulate`.

    Attributes:
        site_file: The local registry, or None.
        workers: Processes that train clients: a number, or `auto`.
        engine: What calls the clients.
        ray_address: Ray cluster to use; None starts one on this machine.
        ray_gpus: Accelerators, or a share of one, that each client takes there.
        sealed: Whether messages are sealed as between machines.
        batching: Whether clients train stacked.
        insecure_seed: Seed of noise that protects nobody; None: secure noise.
        trace: File of devices; None: none, or that of the run's folder.
        quiet: Whether nothing but the result is shown.
    """

    site_file: Path | None = None
    workers: str = "auto"
    engine: EngineName = "inline"
    ray_address: str | None = None
    ray_gpus: float = 0.0
    sealed: bool = False
    batching: Batching = "auto"
    insecure_seed: int | None = None
    trace: Path | None = None
    quiet: bool = False

    def processes(self, most: int) -> int:
        """Worker processes to use: with `auto` as many as there are cores, at most `most`.

        Raises:
            ConfigError: It is no number.
        """
        if self.workers == "auto":
            return max(1, min(os.cpu_count() or 1, most))
        if not self.workers.isdecimal() or int(self.workers) < 1:
            raise ConfigError(f"--workers {self.workers}: expected a number from 1, or auto", hint="try --workers 2")
        return int(self.workers)

    @property
    def cluster(self) -> ClusterOptions | None:
        """The Ray cluster to use."""
        if self.ray_address is None:
            return None
        clients = None if self.workers == "auto" else self.processes(most=1)
        return ClusterOptions(address=self.ray_address, clients=clients, gpus=self.ray_gpus)

    def keep(self, folder: RunFolder) -> None:
        """Write down what changes a run's result, or is needed to do it again."""
        kept = {name: getattr(self, name) for name in _KEPT}
        if self.site_file is not None:
            kept["site_file"] = str(self.site_file.resolve())
        folder.write(HOW, json.dumps(kept, indent=2).encode() + b"\n")
        if self.trace is not None and self.trace != folder.path / TRACE:
            folder.write(TRACE, self.trace.read_bytes())

    @classmethod
    def kept(cls, run: Path) -> Self:
        """What `keep` wrote.

        Raises:
            RunError: It is missing or damaged.
        """
        path = run / HOW
        try:
            found = json.loads(path.read_bytes())
            site, sealed, batching, seed = (found[name] for name in _KEPT)
            if not (isinstance(sealed, bool) and batching in {"auto", "on", "off"} and type(seed) in {int, type(None)}):
                raise ValueError("not what was written")
            site_file = None if site is None else Path(site)
        except (OSError, KeyError, TypeError, ValueError) as e:
            raise RunError(f"{path} is missing or damaged", hint="restore it, or start a new run") from e
        trace = run / TRACE
        return cls(
            site_file=site_file,
            sealed=sealed,
            batching=batching,
            insecure_seed=seed,
            trace=trace if trace.is_file() else None,
        )
