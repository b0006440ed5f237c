"""`coterie provision`: make a federation's kits, answer those who enrol, shut parties out.

Results go to stdout, hints to stderr. No command prints a secret; what is secret is written to a file of its owner.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click
import typer
from typer.core import TyperGroup

from common.errors import ConfigError, KitError, RefusedError

if TYPE_CHECKING:
    pass


class _Commands(TyperGroup):
    """`coterie provision federation.toml` is short for `coterie provision make federation.toml`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `make` before what is no command."""
        if args and args[0] not in {*self.commands, "--help"}:
            args = ["make", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Commands,
    name="provision",
    rich_markup_mode="markdown",  # joins the lines of a paragraph
    help="Make a federation's kits from federation.toml, and decide who belongs to it.\n\n"
    "`coterie provision federation.toml` is short for `coterie provision make federation.toml`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

KitOption = Annotated[Path, typer.Option("--kit", help="The coordinator's kit.", show_default=False)]
WhatArgument = Annotated[
    str, typer.Argument(metavar="NAME|SERIAL", help="A party, or one certificate (see `show`).", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command()
def make(
    file: Annotated[Path, typer.Argument(metavar="FEDERATION.TOML", help="Who takes part.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Folder for the kits.")] = Path("kits"),
    as_json: JsonOption = False,
) -> None:
    """Make the authority and a kit for each party; run again, kits for those who are new.

    Each is a folder and the same as an archive. No key that exists is ever overwritten.
    """
    from common.enrolment import federation_fingerprint
    from server.provisioning import load_federation, provision
    from server.provisioning.report import made_hints, made_table, print_table

    near = difflib.get_close_matches(
        str(file), ["init", "sign", "token", "deny", "allow", "pin", "issuer", "show"], n=1
    )
    if near and not file.exists():
        raise ConfigError(f"there is no file or command `{file}`", hint=f"did you mean `coterie provision {near[0]}`?")
    federation = load_federation(file)
    done = provision(federation, out)
    fingerprint = federation_fingerprint(done.root, done.pins)
    if as_json:
        made = [{"name": m.name, "role": m.role, "folder": str(m.folder), "archive": str(m.archive)} for m in done.made]
        _print_json(federation=federation.name, fingerprint=fingerprint, made=made, kept=list(done.kept))
        return
    if done.made:
        print_table(made_table(done))
    typer.echo(f"federation {federation.name}, fingerprint {fingerprint}")
    made_hints(done, out)


@app.command()
def init(
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("federation.toml"),
    as_json: JsonOption = False,
) -> None:
    """Write an example of federation.toml."""
    from server.provisioning.settings import EXAMPLE

    _write_new(out, EXAMPLE, secret=False)
    _say(as_json, f"wrote {out}", f"change it, then `coterie provision {out} --out kits/`", out=str(out))


@app.command()
def sign(
    request: Annotated[Path, typer.Argument(help="What `coterie enroll` wrote.", show_default=False)],
    *,
    out: Annotated[Path | None, typer.Option("--out", help="The answer; by default NAME.answer.json.")] = None,
    kit: Annotated[Path | None, typer.Option("--kit", help="The coordinator's kit.", show_default=False)] = None,
    authority: Annotated[
        Path | None, typer.Option("--authority", help="The authority's folder, instead.", show_default=False)
    ] = None,
    fingerprint: Annotated[
        str,
        typer.Option("--fingerprint", help="What the party's administrator reads to you; refuse any other."),
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Answer a request: issue its certificate and pin its public record.

    Only the public key of the request is taken. Before you hand the answer out, compare the fingerprint with the
    party's administrator over another way than the request came: who could exchange the request could take the name.

    A party that is known with the same keys gets a new certificate.
    """
    from common.enrolment import Request, federation_fingerprint, read_text, record_fingerprint, same_fingerprint
    from common.pins import Pins
    from server.provisioning import Registry
    from server.provisioning import sign as answer_to
    from server.provisioning.report import hint, pin_hint

    if (kit is None) == (authority is None):
        raise click.UsageError("give --kit with the coordinator's kit, or --authority with the authority's folder")
    registry = Registry.open(kit or authority or Path())
    asked = Request.from_text(read_text(request))
    record = asked.check()
    shown = record_fingerprint(record)
    if fingerprint and not same_fingerprint(fingerprint, shown):
        raise RefusedError(f"the request has the fingerprint {shown}", hint="ask the party to send its request again")
    path = out or Path(f"{record.name}.answer.json")
    _check_free(path)
    answer, new = answer_to(registry, asked)
    _write_new(path, answer.to_text(), secret=False)
    if as_json:
        _print_json(name=record.name, role=record.role, new=new, fingerprint=shown, answer=str(path))
        return
    typer.echo(f"{record.role} {record.name} {'joins' if new else 'has a new certificate'}; the answer is in {path}")
    typer.echo(f"fingerprint of the request: {shown}")
    federation = federation_fingerprint(registry.root, Pins.from_text(answer.parties))
    typer.echo(f"fingerprint of the federation in this answer: {federation}")
    if not fingerprint:
        hint(f"compare the first with {record.name}'s administrator, by telephone say, before you hand the answer out")
    if authority is not None and new:
        hint(f"the server must know it, too: `coterie provision pin {path} --kit kits/server`")
    if new:
        pin_hint(record.name, record.role, registry)


@app.command()
def token(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the new party.", show_default=False)],
    *,
    kit: KitOption,
    role: Annotated[Literal["site", "operator"], typer.Option("--role", help="What it becomes.")] = "site",
    out: Annotated[Path | None, typer.Option("--out", help="File to write; by default NAME.token.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a one-time token, with which a party can join over the network within 24 hours.

    The token is a secret: whoever has it can take the name. It becomes void when it is used.
    """
    from server.provisioning import make_token

    path = out or Path(f"{name}.token")
    _check_free(path)
    made = make_token(kit, name, role=role)
    _write_new(path, made.encode() + "\n", secret=True)
    there = f"hand it over in secret; there: `coterie enroll --token {path.name} --out {name}`"
    text = f"a token for {role} {name} is in {path}, good once and for 24 hours"
    _say(as_json, text, there, name=name, role=role, out=str(path))


@app.command()
def deny(what: WhatArgument, *, kit: KitOption, as_json: JsonOption = False) -> None:
    """Shut out a party, or one certificate of it, at once: open connections are closed within seconds."""
    from server.provisioning.denied import deny as shut_out
    from server.provisioning.report import check_known
    from server.provisioning.tokens import coordinator_registry

    check_known(what, coordinator_registry(kit))
    changed = shut_out(kit, what)
    text = f"{what} is shut out" if changed else f"{what} was shut out before"
    _say(as_json, text, f"`coterie provision allow {what}` lets it in again", entry=what, denied=True, changed=changed)


@app.command()
def allow(what: WhatArgument, *, kit: KitOption, as_json: JsonOption = False) -> None:
    """Take a party or a certificate off the deny list."""
    from server.provisioning.denied import allow as let_in
    from server.provisioning.tokens import coordinator_registry

    coordinator_registry(kit)
    changed = let_in(kit, what)
    text = f"{what} is no longer shut out" if changed else f"{what} was not shut out"
    _say(as_json, text, "", entry=what, denied=False, changed=changed)


@app.command()
def pin(
    file: Annotated[Path, typer.Argument(help="An answer, or another kit's parties.json.", show_default=False)],
    *,
    kit: Annotated[Path, typer.Option("--kit", help="Any party's kit.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Add the public records of new parties to a kit. Those that are pinned are never replaced.

    A site that pins an operator accepts the runs that this operator signs, within its policy.
    """
    from common.enrolment import Answer, read_text, record_fingerprint
    from common.kit import read_facts
    from common.kit_files import add_pins
    from common.pins import Pins

    text = read_text(file)
    try:
        pins = Pins.from_text(Answer.from_text(text).parties)
    except RefusedError:
        pins = Pins.from_text(text)
    if pins.federation != read_facts(kit).federation:
        raise RefusedError(f"{file} is of federation `{pins.federation}`", hint="name a file of this kit's federation")
    new = add_pins(kit, pins.records())
    facts = [{"name": r.name, "role": r.role, "fingerprint": record_fingerprint(r)} for r in new]
    if as_json:
        _print_json(kit=str(kit), pinned=facts)
        return
    for row in facts:
        typer.echo(f"pinned {row['role']} {row['name']}, fingerprint {row['fingerprint']}")
    if not facts:
        typer.echo(f"{kit} knows all of them already")


@app.command()
def issuer(
    *,
    kit: KitOption,
    authority: Annotated[Path, typer.Option("--authority", help="The authority's folder.", show_default=False)],
    revoke: Annotated[
        bool, typer.Option("--revoke", help="The old one was stolen: refuse what it signed, at once.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a new issuer under the same root, in both folders: an issuer lasts five years.

    The running server uses it at once, and nobody else needs to know; except with --revoke: then every party needs a
    new certificate, by `coterie enroll --kit KIT` there and `coterie provision sign` here.
    """
    from server.provisioning.making import replace_issuer

    made = replace_issuer(authority, kit, revoke=revoke)
    old = "the old one is beside it, and still good: delete issuer.old-* in both folders in 30 days"
    if revoke:
        old = "every party asks for a new certificate: `coterie enroll --kit KIT` there, `coterie provision sign` here"
    _say(as_json, f"{made} is new", old, issuer=str(made))


@app.command()
def show(
    kit: Annotated[Path, typer.Option("--kit", help="Any kit, or the authority's folder.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """List the parties of a federation, with their certificates where this kit issues them."""
    from server.provisioning.report import kit_facts, print_table, show_hints, show_table

    facts = kit_facts(kit)
    if as_json:
        _print_json(**facts)
        return
    typer.echo(f"{facts['folder']}: {facts['role']} {facts['name']} of federation {facts['federation']}")
    typer.echo(f"server {facts['server']}; fingerprint of the federation {facts['fingerprint']}")
    print_table(show_table(facts))
    show_hints(facts)


def _check_free(path: Path) -> None:
    if path.exists():
        raise KitError(f"{path} is there already", hint="choose another name with --out")


def _write_new(path: Path, text: str, *, secret: bool) -> None:
    from common.kit_files import put

    _check_free(path)
    put(path, text.encode(), secret=secret)


def _say(as_json: bool, text: str, following: str, **document: Any) -> None:
    from server.provisioning.report import hint

    if as_json:
        _print_json(**document)
        return
    typer.echo(text)
    if following:
        hint(following)


def _print_json(**document: Any) -> None:
    typer.echo(json.dumps({"format": 1, **document}, indent=2))
