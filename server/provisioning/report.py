"""What `coterie provision` tells people: tables on stdout, what to do next on stderr."""

from __future__ import annotations

import difflib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.enrolment import SUITES, federation_fingerprint, record_fingerprint
from common.errors import ConfigError
from common.kit import load_kit, read_facts, read_pins
from common.kit_tls import ROOT, read
from server.provisioning.denied import DENIED, Denied, names_serial
from server.provisioning.making import Provisioned
from server.provisioning.registry import Registry
from server.provisioning.tokens import read_tokens

_WIDE, _ROOMY = 200, 140
"""Columns of a table that is not shown on a terminal, so that nothing in it is cut off."""


def made_table(done: Provisioned) -> Table:
    """The folders that were made, and who gets them."""
    table = _table("party", "role", "kit", "archive", "to")
    goes = {"authority": "a safe, offline", "coordinator": "the server", "site": "the site", "operator": "this person"}
    for made in done.made:
        table.add_row(*map(Text, (made.name, made.role, str(made.folder), made.archive.name, goes[made.role])))
    return table


def made_hints(done: Provisioned, out: Path) -> None:
    """What to do with the kits."""
    names = ", ".join(done.kept)
    if not done.made:
        hint(f"nothing is new: every party of the file has a kit ({names})")
        return
    hint("each kit holds its party's secret keys: hand it over in secret, then delete it here")
    sites = [made for made in done.made if made.role == "site"]
    if not any(made.role == "authority" for made in done.made):
        new = ", ".join(made.name for made in done.made)
        if done.server_kit is not None:
            hint(f"{done.server_kit / 'parties.json'} lists {new}, too; if the server has a copy of it, pin it there:")
        else:
            hint(f"there is no {out / 'server'} here; pin {new} in the server's kit:")
        typer.echo(f"        coterie provision pin {out / 'authority' / 'parties.json'} --kit KIT", err=True)
        if names:
            hint(f"the same at {names}: who pins an operator takes its runs, within its policy")
    else:
        hint(f"take {out / 'authority'} and its archive off the network; only new parties need it")
        hint(f"`coterie server --kit {out / 'server'}` starts the coordinator")
    if sites:
        policy = sites[0].folder / "policy.toml"
        hint(f"each site says what it takes part in: `coterie policy init --out {policy}`, and names its data")


def kit_facts(folder: Path) -> dict[str, Any]:
    """All that is public about a kit, as JSON values.

    Raises:
        KitError: It is damaged or incomplete.
    """
    facts = read_facts(folder)
    issuing = facts.role in {"authority", "coordinator"}
    certificates = dict(Registry.open(folder).newest()) if issuing else {}
    good = Registry.open(folder).unexpired() if issuing else {}
    if facts.role != "authority":
        certificates[facts.name] = load_kit(folder, role=None).certificate()
    pins = read_pins(folder)
    denied = Denied(folder / DENIED).entries()
    parties = []
    for record in pins.records():
        found = certificates.get(record.name)
        parties.append(
            {
                "name": record.name,
                "role": record.role,
                "suite": next(word for word, suite in SUITES.items() if suite is record.suite),
                "fingerprint": record_fingerprint(record),
                "key_id": record.key_id.hex(),
                "serial": f"{found.serial:x}" if found else None,
                "serials": [f"{each.serial:x}" for each in good.get(record.name, [])],
                "not_after": found.not_after.isoformat() if found else None,
                "expired": found.not_after <= datetime.now(UTC) if found else None,
                "denied": denied is None or bool({record.name, f"serial:{found.serial:x}" if found else ""} & denied),
            }
        )
    return {
        "folder": str(folder),
        "federation": facts.federation,
        "name": facts.name,
        "role": facts.role,
        "server": facts.server,
        "fingerprint": federation_fingerprint(read(folder / ROOT), pins),
        "parties": parties,
        "denied": None if denied is None else sorted(denied),
    }


def show_table(facts: dict[str, Any]) -> Table:
    """Every party, with its certificate where it is known here."""
    with_serials = not Console().is_terminal or Console().width >= _ROOMY
    table = _table("party", "role", "fingerprint", "until (UTC)", *(["serial"] if with_serials else []), "")
    table.columns[2].no_wrap = True  # it is read aloud
    for party in facts["parties"]:
        until = "-" if party["not_after"] is None else party["not_after"][:16].replace("T", " ")
        note, style = ("denied", "red") if party["denied"] else ("expired", "yellow") if party["expired"] else ("", "")
        serial = ["\n".join(party["serials"]) or party["serial"] or "-"] if with_serials else []
        cells = (party["name"], party["role"], party["fingerprint"], until, *serial)
        table.add_row(*map(Text, cells), Text(note, style=style))
    return table


def show_hints(facts: dict[str, Any]) -> None:
    """What is wrong, and where the rest is."""
    names = {party["name"] for party in facts["parties"]}
    denied = facts["denied"]
    if denied is None:
        hint(f"{DENIED} cannot be read: until it is mended everybody is refused")
        return
    for entry in denied:
        if entry not in names and not names_serial(entry):
            hint(f"{DENIED} names `{entry}`, which is no party: it shuts out nobody")
    if any(party["expired"] for party in facts["parties"]):
        hint("a party whose certificate has expired asks for a new one: `coterie enroll --kit KIT` there")
    if facts["role"] == "authority":
        hint("certificates are those that were issued here; the server's kit knows the renewed ones")


def print_table(table: Table) -> None:
    """To stdout, as wide as it needs where that is no terminal."""
    console = Console()
    console.print(table) if console.is_terminal else Console(width=_WIDE).print(table)


def hint(text: str) -> None:
    """One sentence on stderr: what to do next."""
    typer.secho("hint: ", fg="cyan", bold=True, nl=False, err=True)
    typer.echo(text, err=True)


def check_known(what: str, registry: Registry) -> None:
    """Refuse a name that nobody has: a typing error would shut out no one, and nobody would notice.

    Raises:
        ConfigError: With the name that was meant, if there is one like it.
    """
    names = [record.name for record in registry.pins().records()]
    names += [entry.name for entry in read_tokens(registry.folder) if entry.used is None]
    if what in names or names_serial(what):
        return
    near = difflib.get_close_matches(what, names, n=1)
    mend = f"did you mean `{near[0]}`?" if near else f"`coterie provision show --kit {registry.folder}` lists them"
    raise ConfigError(f"there is no party and no certificate `{what}`", hint=mend)


def pin_hint(name: str, role: str, registry: Registry) -> None:
    """What the other sites do about a new party."""
    others = [record.name for record in registry.pins().sites.values() if record.name != name]
    if others:
        why = "before it takes its runs" if role == "operator" else "for secure aggregation"
        hint(
            f"each site pins {name} {why}: send it {registry.folder / 'parties.json'}, "
            "and there: `coterie provision pin parties.json --kit KIT`"
        )


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
