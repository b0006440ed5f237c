"""`coterie enroll`: join a federation with keys that are made here and never leave. Hints go to stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click
import typer

if TYPE_CHECKING:
    from common.enrolment import Request


def enroll(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="This party's name, to begin with.", show_default=False)
    ] = "",
    *,
    federation: Annotated[str, typer.Option("--federation", help="The federation's name.")] = "",
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the new kit.", show_default=False)] = None,
    kit: Annotated[
        Path | None, typer.Option("--kit", help="A kit that was begun, or needs a new certificate.", show_default=False)
    ] = None,
    answer: Annotated[
        Path | None, typer.Option("--answer", help="What `coterie provision sign` answered.", show_default=False)
    ] = None,
    token: Annotated[
        str, typer.Option("--token", help="File with a one-time token; - reads stdin.", show_default=False)
    ] = "",
    role: Annotated[Literal["site", "operator"], typer.Option("--role", help="What this party is.")] = "site",
    suite: Annotated[
        Literal["ed25519", "ed25519+ml-dsa-65"], typer.Option("--suite", help="The federation's signatures.")
    ] = "ed25519",
    fingerprint: Annotated[
        str, typer.Option("--fingerprint", help="The federation's, as its administrator reads it; refuse any other.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Join a federation with keys that are made here: no private key ever leaves the kit.

    By hand: `coterie enroll NAME --federation F --out KIT` makes keys and a
    request; the federation's administrator answers it with `coterie provision
    sign`; `coterie enroll --answer ANSWER --kit KIT` completes the kit.

    With a one-time token: `coterie enroll --token FILE --out KIT` does all of
    it over the network.

    Where a certificate has expired: `coterie enroll --kit KIT` makes a request
    with the same keys.

    Who joined without --fingerprint compares it later, before it takes part in
    secure aggregation: `coterie enroll --kit KIT --fingerprint F`, with what
    other sites read from `coterie provision show`.
    """
    if token:
        _only(token=True, name=name, federation=federation, kit=kit, answer=answer)
        _by_token(token, _needed(out, "--out"), fingerprint, as_json=as_json)
    elif answer is not None:
        _only(answer=True, name=name, federation=federation, out=out)
        _complete(answer, _needed(kit, "--kit"), fingerprint, as_json=as_json)
    elif kit is not None:
        _only(kit=True, name=name, federation=federation, out=out)
        _confirm(kit, fingerprint, as_json=as_json) if fingerprint else _again(kit, as_json=as_json)
    else:
        if not name:
            raise click.UsageError("give NAME, --token, --answer or --kit")
        if not federation:
            raise click.UsageError("--federation is needed: the name of the federation")
        _begin(name, federation, _needed(out, "--out"), role, suite, as_json=as_json)


def _begin(
    name: str, federation: str, out: Path, role: Literal["site", "operator"], suite: str, *, as_json: bool
) -> None:
    from client.enrolment import REQUEST, begin

    request = begin(out, federation=federation, name=name, role=role, suite=suite)
    _tell_request(request, out / REQUEST, as_json=as_json)


def _again(kit: Path, *, as_json: bool) -> None:
    from client.enrolment import REQUEST, ask_again

    _tell_request(ask_again(kit), kit / REQUEST, as_json=as_json)


def _confirm(kit: Path, fingerprint: str, *, as_json: bool) -> None:
    from client.enrolment import confirm

    shown = confirm(kit, fingerprint)
    if as_json:
        _print_json(kit=str(kit), fingerprint=shown, confirmed=True)
        return
    typer.echo(f"everybody whom {kit} pins is who others know, too: {shown}")


def _tell_request(request: Request, path: Path, *, as_json: bool) -> None:
    from common.enrolment import record_fingerprint

    record = request.check()
    fingerprint = record_fingerprint(record)
    if as_json:
        _print_json(name=record.name, role=record.role, request=str(path), fingerprint=fingerprint)
        return
    typer.echo(f"the request of {record.role} {record.name} is in {path}, and holds no secret")
    typer.echo(f"fingerprint of the request: {fingerprint}")
    _hint("send it to the federation's administrator, and read the fingerprint to them over another way")
    _hint(f"with the answer: `coterie enroll --answer ANSWER --kit {path.parent}`")


def _complete(path: Path, kit: Path, fingerprint: str, *, as_json: bool) -> None:
    from client.enrolment import finish
    from common.enrolment import Answer, read_text

    shown = finish(kit, Answer.from_text(read_text(path)), fingerprint=fingerprint)
    _tell_done(kit, shown, compared=bool(fingerprint), as_json=as_json)


def _by_token(source: str, out: Path, fingerprint: str, *, as_json: bool) -> None:
    from client.enrolment import enrol_with
    from common.enrolment import Token, read_text

    text = sys.stdin.read() if source == "-" else read_text(Path(source))
    shown = enrol_with(Token.decode(text), out, fingerprint=fingerprint)
    _tell_done(out, shown, compared=True, as_json=as_json)  # the token named root and coordinator


def _tell_done(kit: Path, fingerprint: str, *, compared: bool, as_json: bool) -> None:
    from common.kit import load_kit

    done = load_kit(kit, role=None)
    until = done.certificate().not_after
    if as_json:
        document = {"name": done.name, "role": done.role, "kit": str(kit), "fingerprint": fingerprint}
        _print_json(**document, server=done.address, not_after=until.isoformat())
        return
    typer.echo(f"{done.role} {done.name} belongs to federation {done.federation}; the kit in {kit} is complete")
    typer.echo(f"fingerprint of the federation: {fingerprint}")
    typer.echo(f"certificate until {until:%Y-%m-%d %H:%M} UTC; it renews itself while the party is in touch")
    if not compared:
        _hint("compare the fingerprint with the federation's administrator before you start: it says whom you trust")
    if done.unconfirmed:
        _hint(f"and with other sites, for secure aggregation; then: `coterie enroll --kit {kit} --fingerprint F`")
    if done.role == "site":
        _hint(f"say what this site takes part in: `coterie policy init --out {kit / 'policy.toml'}`")
        _hint(f"say where its data is: {kit / 'site.toml'}; then `coterie client --kit {kit}`")
    else:
        _hint(f"`coterie submit run.toml --kit {kit}`")


def _only(**given: Any) -> None:
    """Refuse options that do not go together with the first."""
    first, *others = given
    for other in others:
        if given[other]:
            raise click.UsageError(f"--{first} goes without {other.upper() if other == 'name' else f'--{other}'}")


def _needed(path: Path | None, option: str) -> Path:
    if path is None:
        raise click.UsageError(f"{option} is needed: the folder of the kit")
    return path


def _hint(text: str) -> None:
    typer.secho("hint: ", fg="cyan", bold=True, nl=False, err=True)
    typer.echo(text, err=True)


def _print_json(**document: Any) -> None:
    typer.echo(json.dumps({"format": 1, **document}, indent=2))
