"""Hosts of a test network: network namespaces that meet at one bridge, each with an address of its own.

Where the system does not allow them (no root, no iproute2), all hosts are this one on loopback; a test notes that.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """One machine of the test network.

    Attributes:
        name: Its name in the test.
        address: Where others reach it.
        prefix: What a command begins with to run there; empty on loopback.
        plug: Its end of the cable at the bridge, and the namespace that this lies in; empty on loopback.
    """

    name: str
    address: str
    prefix: tuple[str, ...] = ()
    plug: tuple[str, str] = ("", "")

    def cut(self) -> None:
        """Pull the cable: packets vanish, no connection is told."""
        self._set_link("down")

    def mend(self) -> None:
        """Plug the cable in again."""
        self._set_link("up")

    def _set_link(self, state: str) -> None:
        switch, link = self.plug
        _ip("-n", switch, "link", "set", link, state)


def namespaces_work() -> bool:
    """Whether this process may make network namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    probe = f"coterie-{secrets.token_hex(4)}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode != 0:
        return False
    _ip("netns", "del", probe)
    return True


@contextmanager
def hosts(names: Sequence[str]) -> Iterator[dict[str, Host]]:
    """Hosts that reach each other, by name; gone when the block ends."""
    if not namespaces_work():
        yield {name: Host(name=name, address="127.0.0.1") for name in names}
        return
    token = secrets.token_hex(3)
    switch = f"coterie-{token}-switch"
    spaces = [switch, *(f"coterie-{token}-{i}" for i in range(len(names)))]
    made: dict[str, Host] = {}
    try:
        for space in spaces:
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for i, (name, space) in enumerate(zip(names, spaces[1:], strict=True)):
            near, far = f"c{token}n{i}", f"c{token}f{i}"
            address = f"10.77.{i // 200}.{i % 200 + 1}"
            _ip("link", "add", near, "netns", switch, "type", "veth", "peer", "name", far, "netns", space)
            _ip("-n", switch, "link", "set", near, "master", "bridge")
            _ip("-n", switch, "link", "set", near, "up")
            _ip("-n", space, "addr", "add", f"{address}/16", "dev", far)
            _ip("-n", space, "link", "set", far, "up")
            made[name] = Host(name=name, address=address, prefix=("ip", "netns", "exec", space), plug=(switch, near))
        yield made
    finally:
        for space in spaces:
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "del", space)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=60)
