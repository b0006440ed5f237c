"""Federations on the disk, with real keys and certificates."""

from __future__ import annotations

import atexit
import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from common.crypto import PartyKeys, Suite, generate_tls_key, make_csr
from common.enrolment import Request
from server.provisioning import Federation, provision

NAME = "study"


def federation_of(
    sites: Iterable[str] = ("north", "south"), operators: Iterable[str] = ("alice",), **settings: str
) -> Federation:
    """What a federation.toml with these parties says."""
    tables = {"sites": {name: {} for name in sites}, "operators": {name: {} for name in operators}}
    return Federation.model_validate({"name": NAME, "server": "localhost:8471", **tables, **settings})


@cache
def _made() -> Path:
    out = Path(mkdtemp(prefix="coterie-kits-"))
    atexit.register(shutil.rmtree, out, ignore_errors=True)
    provision(federation_of(), out)
    return out


def copy_kits(out: Path) -> Path:
    """The kits of `federation_of()`, made once for the process and copied: two sites and an operator."""
    return shutil.copytree(_made(), out)


def request_of(
    name: str = "west", *, keys: PartyKeys | None = None, csr: bytes | None = None, suite: Suite = Suite.ED25519
) -> Request:
    """A signed request of a new site, or with other keys or another CSR."""
    keys = keys or PartyKeys.generate(name, "site", suite=suite)
    csr = csr or make_csr(generate_tls_key(), federation=NAME, role="site", name=name)
    return Request.of(keys, federation=NAME, csr_pem=csr)
