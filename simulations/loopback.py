"""A federation on this machine: kits in a folder and a process for each party, over loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Final, Self

from common.errors import CoterieError, RunError
from common.kit import load_kit
from server.provisioning import load_federation, provision
from server.remote import Coordinator

SITES: Final = ("cleveland", "hungary", "switzerland", "va-long-beach")
OPERATOR: Final = "operator"
POLICY: Final = """\
# For this demonstration: public data, so runs without privacy are welcome.
[budget]
epsilon = 10.0
delta = 1e-5

[allow]
data = {data}
metrics = ["train_loss", "within", "num-examples"]

[limits]
units = ["none", "example", "client"]
smallest_cohort = 1
"""
_PATIENCE_SECONDS: Final = 300.0
_TERM_SECONDS: Final = 20.0


class Party:
    """One process of the federation; its output goes to a file.

    Args:
        arguments: What follows `coterie`.
        log: The file.
        environment: Variables added to this process's own.
    """

    def __init__(self, arguments: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        self._arguments = list(arguments)
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, anew if it has ended."""
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own command, arguments as a list
                [sys.executable, "-m", "common.cli", *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **self._environment},
                start_new_session=True,
            )

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process.

        Raises:
            RunError: It was never started.
        """
        if self._process is None:
            raise RunError("the party was not started", hint="start it first")
        return self._process

    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End it as a power cut does; returns when it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> int | None:
        """End it in good order; its exit code, None if it was never started."""
        if self._process is None:
            return None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_TERM_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
        return self._process.returncode

    def tail(self, lines: int = 15) -> str:
        """The end of what it said."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])


class LocalFederation:
    """Kits in a folder, and a process for each of them; a context that ends them all.

    Args:
        folder: Where kits and logs go.
        sites: Their names.
        data: Data sets that every site's policy allows.
        server_options: Further arguments of `coterie server`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        sites: Sequence[str] = SITES,
        data: Sequence[str] = ("heart",),
        server_options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.sites = tuple(sites)
        self.port = free_port()
        self.kits = folder / "kits"
        logs = folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self._provision(data)
        server = ["server", "--kit", str(self.kits / "server"), "--host", "127.0.0.1", *server_options]
        self.server = Party(server, log=logs / "server.log", environment=environment)
        self.clients = {
            name: Party(["client", "--kit", str(self.kits / name)], log=logs / f"{name}.log", environment=environment)
            for name in self.sites
        }

    def __enter__(self) -> Self:
        """Nothing is started yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """End whatever runs."""
        self.stop()

    @property
    def operator_kit(self) -> Path:
        """Folder of the operator's kit."""
        return self.kits / OPERATOR

    @property
    def state(self) -> Path:
        """Folder of the coordinator's state."""
        return self.kits / "server" / "state"

    def start(self) -> None:
        """Start the coordinator and every site."""
        self.server.start()
        for client in self.clients.values():
            client.start()

    def stop(self) -> None:
        """End every process: first the sites, which finish what they have at hand."""
        for client in self.clients.values():
            if client.alive():
                client.process.send_signal(signal.SIGTERM)
        for client in self.clients.values():
            client.stop()
        self.server.stop()

    @contextmanager
    def operator(self) -> Iterator[Coordinator]:
        """The coordinator as the operator reaches it."""
        with Coordinator(load_kit(self.operator_kit, role="operator")) as coordinator:
            yield coordinator

    def wait_until_answered(self) -> None:
        """Until the coordinator answers its operator.

        Raises:
            RunError: It ended, or does not answer.
        """
        end = monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                with self.operator() as coordinator:
                    coordinator.ask("sites")
            except CoterieError as e:
                if not self.server.alive() or monotonic() > end:
                    raise RunError(
                        f"the coordinator does not answer ({e}); its log ends with:\n{self.server.tail()}",
                        hint=f"see {self.server.log}",
                    ) from e
            else:
                return

    def _provision(self, data: Sequence[str]) -> None:
        text = "".join(
            [
                f'name = "loopback"\nserver = "127.0.0.1:{self.port}"\n',
                *(f"[sites.{name}]\n" for name in self.sites),
                f"[operators.{OPERATOR}]\n",
            ]
        )
        settings = self.folder / "federation.toml"
        settings.write_text(text, encoding="utf-8")
        provision(load_federation(settings), self.kits)
        for name in self.sites:
            policy = POLICY.format(data=json.dumps(list(data)))
            (self.kits / name / "policy.toml").write_text(policy, encoding="utf-8")


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
