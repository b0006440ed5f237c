"""Flower's own runtime on loopback, as docs/flower-runtime.md says: a SuperLink and SuperNodes with TLS, node
authentication and executors of their own; every process ends with the block, by its own process group.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

BIN = Path(sys.executable).parent
HANG = 120.0
"""Seconds after which something that was waited for never comes."""
LINK = "link"
"""Name of the SuperLink in every party's config.toml."""

_KEEP = """
CREATE TABLE kept (content BLOB);
CREATE TRIGGER keep AFTER UPDATE OF content ON objects WHEN length(NEW.content) > 0
BEGIN INSERT INTO kept VALUES (NEW.content); END;
"""


class Program:
    """A running program whose output is kept, so that one can wait for a line of it."""

    def __init__(self, command: Sequence[str | Path], environment: Mapping[str, str], *, cwd: Path) -> None:
        self.output = ""
        self._told = threading.Condition()
        self._ended = False
        self._process = subprocess.Popen(
            [str(word) for word in command],
            env=dict(environment),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._told:
                self.output += line
                self._told.notify_all()
        with self._told:
            self._ended = True
            self._told.notify_all()

    def wait_for(self, text: str) -> None:
        with self._told:
            self._told.wait_for(lambda: text in self.output or self._ended, HANG)
            assert text in self.output, self.output

    def stop(self) -> None:
        """End it and what it started: first kindly, then at once."""
        for how, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, HANG)):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, how)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
        self._reader.join(HANG)
        assert self._process.stdout is not None
        self._process.stdout.close()


@dataclass
class Runtime:
    """What runs: `folder` holds one folder a party and what the SuperLink keeps."""

    folder: Path
    programs: dict[str, Program]

    @property
    def database(self) -> Path:
        return self.folder / "superlink" / "state.db"

    def flwr(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """`flwr`, as the operator calls it."""
        return subprocess.run(
            [str(BIN / "flwr"), *map(str, words)],
            env=environment(self.folder / "operator"),
            cwd=self.folder / "operator",
            capture_output=True,
            text=True,
            check=False,
            timeout=4 * HANG,
        )

    def run(self, bundle: Path) -> tuple[str, str]:
        """`flwr run`, until the run has ended: its status, and what was written on the way."""
        output = self.flwr("run", bundle, LINK, "--stream")
        listed = json.loads(self.flwr("list", LINK, "--format", "json").stdout)["runs"]
        newest = max(listed, key=lambda run: run["pending-at"])
        return newest["status"], output.stdout + output.stderr

    def stored(self) -> list[bytes]:
        """Every object that ever came to the SuperLink, as it stored it."""
        with closing(sqlite3.connect(self.database)) as database:
            return [row[0] for row in database.execute("SELECT content FROM kept")]

    def stop(self) -> None:
        while self.programs:
            self.programs.popitem()[1].stop()


def environment(home: Path, **more: str) -> dict[str, str]:
    """What a party's processes see: a home of their own, no telemetry, no look for updates, no installation."""
    home.mkdir(parents=True, exist_ok=True)
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ}
    return {
        **kept,
        "PATH": f"{BIN}{os.pathsep}{kept.get('PATH', '')}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PYTHONUNBUFFERED": "1",
        **more,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def flower_runtime(
    folder: Path, *, server_kit: Path, site_kits: Mapping[str, Path], executors: Mapping[str, Path]
) -> Iterator[Runtime]:
    """A SuperLink with a database that forgets nothing, and a SuperNode for every site.

    Args:
        folder: For everything that they write.
        server_kit: The coordinator's kit; its certificate is the SuperLink's, too.
        site_kits: The sites' kits by name.
        executors: Folders with a site's own `flwr-clientapp`; other sites use Flower's.
    """
    runtime = Runtime(folder, {})
    with ExitStack() as undo:
        undo.callback(runtime.stop)
        link = f"127.0.0.1:{_start_superlink(runtime, server_kit)}"
        (folder / "operator").mkdir()
        (folder / "operator" / "config.toml").write_text(
            f'[superlink]\ndefault = "{LINK}"\n[superlink.{LINK}]\naddress = "{link}"\n'
            f'root-certificates = "{server_kit / "ca.pem"}"\n'
        )
        for site, kit in site_kits.items():
            _start_supernode(runtime, link, site, kit, executors.get(site))
        for site in site_kits:
            runtime.programs[f"{site} node"].wait_for("SuperNode ID")
        yield runtime


def _start_superlink(runtime: Runtime, kit: Path) -> int:
    """SuperLink and its executor; where it listens."""
    home, port = runtime.folder / "superlink", free_port()
    home.mkdir()
    secret = _secret(home)
    superlink: list[str | Path] = [
        *(BIN / "flower-superlink", "--host", "127.0.0.1", "--port", str(port), "--database", runtime.database),
        *("--ssl-ca-certfile", kit / "ca.pem", "--ssl-certfile", kit / "tls/chain.pem"),
        *("--ssl-keyfile", kit / "tls/private.pem", "--enable-supernode-auth"),
        *("--isolation", "process", "--superexec-auth-secret-file", secret),
        "--disable-runtime-dependency-installation",
    ]
    program = runtime.programs["superlink"] = Program(superlink, environment(home), cwd=home)
    program.wait_for("Uvicorn running")
    with closing(sqlite3.connect(runtime.database)) as database:
        database.executescript(_KEEP)
    executor: list[str | Path] = [
        *(BIN / "flower-superexec", "--runtime-api-address", f"127.0.0.1:{port}"),
        *("--root-certificates", kit / "ca.pem", "--superexec-auth-secret-file", secret),
    ]
    home = runtime.folder / "coordinator"
    runtime.programs["coordinator"] = Program(executor, environment(home, COTERIE_KIT=str(kit)), cwd=home)
    return port


def _start_supernode(runtime: Runtime, link: str, site: str, kit: Path, own_executor: Path | None) -> None:
    """Register one site's node under the site's name; start it and its executor."""
    home, port = runtime.folder / site, free_port()
    settings = environment(home, COTERIE_KIT=str(kit))
    secret, key = _secret(home), _node_key(home)
    registered = runtime.flwr("supernode", "register", key.with_suffix(".pub"), LINK, "--name", site)
    assert registered.returncode == 0, registered.stdout + registered.stderr
    node: list[str | Path] = [
        *(BIN / "flower-supernode", "--superlink", link, "--root-certificates", kit / "ca.pem"),
        *("--auth-supernode-private-key", key, "--host", "127.0.0.1", "--port", str(port)),
        *("--isolation", "process", "--superexec-auth-secret-file", secret),
    ]
    program = runtime.programs[f"{site} node"] = Program(node, settings, cwd=home)
    program.wait_for("Uvicorn running")
    if own_executor is not None:
        settings["PATH"] = f"{own_executor}{os.pathsep}{settings['PATH']}"
    executor: list[str | Path] = [
        *(BIN / "flower-superexec", "--insecure", "--runtime-api-address", f"127.0.0.1:{port}"),
        *("--superexec-auth-secret-file", secret),
    ]
    runtime.programs[site] = Program(executor, settings, cwd=home)


def _secret(home: Path) -> Path:
    """What an executor proves itself with."""
    path = home / "executor.secret"
    path.write_text(secrets.token_hex(32))
    path.chmod(0o600)
    return path


def _node_key(home: Path) -> Path:
    """What a SuperNode proves itself with: as `ssh-keygen -t ecdsa -b 384` makes it."""
    key, path = ec.generate_private_key(ec.SECP384R1()), home / "node.key"
    encoding, none = serialization.Encoding, serialization.NoEncryption()
    path.write_bytes(key.private_bytes(encoding.PEM, serialization.PrivateFormat.OpenSSH, none))
    path.chmod(0o600)
    public = key.public_key().public_bytes(encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_suffix(".pub").write_bytes(public)
    return path


def settings_of(bundle: Path) -> dict[str, Any]:
    """The settings that travel in a bundle."""
    import tomllib

    tree: dict[str, Any] = tomllib.loads((bundle / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    return tree
