"""`federation.toml`: who takes part. Read once by `coterie provision`; nobody else needs it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from common.crypto import Suite
from common.crypto.identity import Name
from common.enrolment import SUITES
from common.errors import ConfigError

COORDINATOR, AUTHORITY = "server", "authority"
"""Names of the coordinator's kit and of the authority's folder; no site or operator may have them."""

_HOST = re.compile(r"^(?:\[[0-9a-fA-F:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?)$")

EXAMPLE = """\
# Who takes part. `coterie provision federation.toml --out kits/` makes a kit for each; run it again after adding some.
# Names: letters, digits, - and _. They stand in certificates and cannot be changed later.

name = "heart-study"                       # of the federation
server = "coordinator.example.org:8443"    # where the sites reach the coordinator: host:port

# Signatures. "ed25519+ml-dsa-65" asks for both with every message: as strong, and stays so where a quantum computer
# breaks the first. Sealing is post-quantum either way. Cannot be changed later.
# suite = "ed25519"

# Organisations that hold data. A site can also make its keys by itself, and then does not stand here:
# see `coterie enroll --help`.
[sites.hospital-a]
[sites.hospital-b]

# People who may submit runs.
[operators.alice]
"""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PartyTable(_Table):
    """A party; nothing needs to be said of it but its name."""


class Federation(_Table):
    """All that `federation.toml` says."""

    name: Name = Field(description="Name of the federation.")
    server: str = Field(description="Where sites reach the coordinator, as host:port.")
    suite: Literal["ed25519", "ed25519+ml-dsa-65"] = Field("ed25519", description="Signatures of every party.")
    sites: dict[Name, PartyTable] = Field({}, description="Organisations that hold data.")
    operators: dict[Name, PartyTable] = Field({}, description="People who may submit runs.")

    @model_validator(mode="after")
    def _names_are_unique(self) -> Federation:
        seen = {COORDINATOR, AUTHORITY}
        for name in [*self.sites, *self.operators]:
            if name.casefold() in seen:  # capitals do not count: some file systems take them for the same folder
                raise PydanticCustomError(
                    "name_twice", "the name `{name}` is taken; every kit needs its own", {"name": name}
                )
            seen.add(name.casefold())
        return self

    @model_validator(mode="after")
    def _address_is_whole(self) -> Federation:
        if not _is_address(self.server):
            raise PydanticCustomError("address", "`server` must be host:port, such as coordinator.example.org:8443")
        return self

    @property
    def signatures(self) -> Suite:
        """The suite of every record."""
        return SUITES[self.suite]

    @property
    def parties(self) -> dict[str, Literal["site", "operator"]]:
        """Role of every site and operator by name, sorted."""
        roles: dict[str, Literal["site", "operator"]] = dict.fromkeys(self.sites, "site")
        roles |= dict.fromkeys(self.operators, "operator")
        return dict(sorted(roles.items()))


def host_of(address: str) -> str:
    """The host of a `host:port`."""
    return address.rpartition(":")[0].strip("[]")


def _is_address(address: str) -> bool:
    host, _, port = address.rpartition(":")
    return bool(_HOST.match(host)) and port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16


def load_federation(path: Path) -> Federation:
    """Read `federation.toml`.

    Raises:
        ConfigError: The file is missing, not TOML, or has unknown keys or impossible values.
    """
    hint = "`coterie provision init` writes an example"
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}", hint=hint) from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ConfigError(f"{path} is not valid TOML: {e}", hint=hint) from e
    try:
        return Federation.model_validate(tree)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "[key]")
        named = f"`{where}`: " if where else ""
        if first["type"] == "string_pattern_mismatch":
            raise ConfigError(f"{path}: {named}a name has letters, digits, `-` and `_`, at most 64", hint=hint) from e
        raise ConfigError(f"{path}: {named}{first['msg']}", hint=hint) from e
